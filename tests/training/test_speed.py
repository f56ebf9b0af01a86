"""The absence of what slows a step down: graph breaks, recompilation, waiting for the device."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from cucafera.config.registry import OPTIMIZERS
from cucafera.model.transformer import Decoder
from cucafera.run import train
from cucafera.training.callbacks.profile import kind_of
from cucafera.training.module import LanguageModel
from tests.support import assert_close, weights


@pytest.fixture
def traced_only(monkeypatch):
    """The compiler takes the model apart as always, and what it found runs as it is, without being translated."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(Decoder, "compile", lambda model, **how: compile_module(model, **how, backend="eager"))
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("documents", [True, False])
def test_a_run_is_compiled_once_for_training_and_once_for_validation(small_run, documents, caplog):
    masking = f"data.document_masking={str(documents).lower()}"
    train(small_run("name=plain", masking, "trainer.micro_batch_windows=4"), [])
    compiled = small_run(
        "name=compiled", masking, "trainer.micro_batch_windows=4", "trainer.compile=true", "data.validation_windows=6"
    )
    train(compiled, [])
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert_close(weights("outputs/plain"), weights("outputs/compiled"))


@pytest.mark.usefixtures("traced_only")
def test_checkpointed_layers_are_compiled_without_graph_breaks(small_run):
    settings = ("trainer.compile=true", "trainer.activation_checkpointing=true", "callbacks.validate_every_steps=0")
    train(small_run("name=compiled", *settings), [])
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2


class Waits(TorchDispatchMode):
    """Counts how often a number is read from a tensor: what would make the program wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.at_step: Counter[int] = Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), settings=None):
        if operation in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.at_step[self.step] += 1
        return operation(*arguments, **(settings or {}))


@pytest.mark.parametrize("optimizer", OPTIMIZERS.names())
def test_no_number_is_read_between_two_log_steps(small_run, monkeypatch, optimizer):
    waits = Waits()
    training_step = LanguageModel.training_step

    def counted_step(module, batch, batch_idx):
        waits.step = module.steps_done + 1
        return training_step(module, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "training_step", counted_step)
    config = small_run(
        "name=run", "callbacks.log_every_steps=4", "callbacks.validate_every_steps=0",
        "callbacks.checkpoint_every_steps=0", "trainer.micro_batch_windows=2", f"optimizer={optimizer}",
    )  # fmt: skip
    with waits:
        train(config, [])
    steps_that_read = {step for step in waits.at_step if step}
    assert steps_that_read and all(config.is_log_step(step) for step in steps_that_read), waits.at_step


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", ["true", "false"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.names())
def test_a_step_does_not_wait_for_a_gpu(small_run, monkeypatch, optimizer, compiled):
    training_step = LanguageModel.training_step

    def watched_step(module, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("error" if module.steps_done >= 2 else "default")  # the first ones compile
        try:
            return training_step(module, batch, batch_idx)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(LanguageModel, "training_step", watched_step)
    wider = "model.hidden_size=128"  # heads of 32
    train(small_run("name=run", "trainer=auto", wider, f"trainer.compile={compiled}", f"optimizer={optimizer}"), [])


def test_a_profile_says_where_the_time_goes(small_run, caplog):
    caplog.set_level("INFO")
    config = small_run("name=run", "trainer.profile=true", "callbacks.validate_every_steps=0")
    train(config, [])
    folder = Path(config.run_dir)
    table = (folder / "profile.txt").read_text()
    assert table.strip() in caplog.text
    rows = {line[:24].strip(): float(line[24:36]) for line in table.splitlines()[1:]}
    assert {"step", "matrix products", "attention", "optimizer", "waiting for data"} <= set(rows)
    assert rows.pop("step") == pytest.approx(sum(rows.values()), rel=0.05)
    assert (folder / "profile.json.gz").stat().st_size > 1000


def test_a_profile_of_the_end_of_a_run_has_the_steps_there_are(small_run):
    horizon = "schedule.horizon_steps=12"
    train(small_run("name=run", horizon, "budget_tokens=2560"), [])
    config = small_run("name=run", horizon, "trainer.profile=true")  # resumes, with two steps left
    train(config, [])
    assert "ms per step" in (Path(config.run_dir) / "profile.txt").read_text()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("triton_tem_fused_flex_attention_backward_3", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("torch_attn::_varlen_attn_backward", "attention"),
        ("_cross_entropy_in_place", "loss"),
        ("cucafera::linear_cross_entropy", "loss"),
        ("triton_poi_fused_add_mul_4", "fused by the compiler"),
        ("void at::native::multi_tensor_apply_kernel<...FusedAdamMathFunctor...>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "between devices"),
        ("aten::mul", "elementwise and other"),
    ],
)
def test_operations_and_kernels_are_classified(name, kind):
    assert kind_of(name) == kind
