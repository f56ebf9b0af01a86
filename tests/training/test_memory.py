"""Memory: what a step takes, what it is cut down to, and what happens when it was too much."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from cucafera.composition import composed_config
from cucafera.config import UserError
from cucafera.data.windows import TrainingSteps
from cucafera.model.flops import parameter_count
from cucafera.model.transformer import Decoder
from cucafera.run import train
from cucafera.training.hardware import USABLE_MEMORY, StepMemory, decide_hardware
from cucafera.training.run_folder import RunFolder
from tests.conftest import CUCAFERA
from tests.test_readme import README, load_script
from tests.test_recovery import history_of
from tests.test_run import assert_equal, weights

SHALLOW = [
    "model.vocab_size=4096", "model.hidden_size=256", "model.intermediate_size=704", "model.num_hidden_layers=4",
    "model.num_attention_heads=4", "model.max_position_embeddings=2048", "tokenizer.vocab_size=1024",
]  # fmt: skip


def test_activation_checkpointing_gives_the_same_gradients_to_the_bit():
    config = composed_config(["model.vocab_size=320"]).model
    ids = torch.randint(10, 320, (2, 65), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(64) // 24).to(torch.int32).expand(2, 64)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = Decoder(config, checkpointing)
        model(ids[:, :-1], ids[:, 1:], documents).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert_equal(*gradients)


@pytest.mark.parametrize(("precision", "checkpointing"), itertools.product(("bf16", "fp32"), (False, True)))
def test_the_estimate_of_memory_is_what_a_step_allocates(precision, checkpointing):
    config, windows = composed_config(SHALLOW), 16
    computed = load_script("memory").computed_peak(config, windows, precision, checkpointing)
    estimate = StepMemory(config, precision).at(windows * 2048, checkpointing)
    # With checkpointing, the loss and the layer that is computed again never take their memory at the same time.
    assert 0.93 * computed < estimate < (1.4 if checkpointing else 1.07) * computed


@pytest.mark.slow
@pytest.mark.parametrize(("model", "gigabytes"), [("cucafera", 8), ("large", 24)])
def test_a_step_with_activation_checkpointing_fits_a_small_gpu(model, gigabytes):
    config = composed_config([f"model={model}"])
    peak = load_script("memory").computed_peak(config, 1, "bf16", True)
    assert peak < USABLE_MEMORY * gigabytes * 1e9
    assert f"{peak / 2**30:.2f} GiB: fits {gigabytes} GB" in README


def test_devices_that_share_weights_and_moments_need_less_each():
    ddp, fsdp = (composed_config(["+experiment=pretrain", f"trainer={strategy}"]) for strategy in ("ddp", "fsdp"))
    alone, together = StepMemory(ddp, "fp32"), StepMemory(fsdp, "fp32", world_size=8)
    assert alone.always == StepMemory(ddp, "fp32", world_size=8).always == StepMemory(fsdp, "fp32").always
    head = 4 * 65_536 * 768  # whole while it is used
    assert alone.always - together.always == 12 * parameter_count(ddp.model) * 7 // 8 - head
    assert alone.per_token(False) == together.per_token(False)


@pytest.mark.parametrize(("precision", "residual_precision"), [("bf16", "fp32"), ("bf16", "bf16"), ("fp32", "fp32")])
def test_the_estimate_of_what_a_compiled_layer_keeps_is_what_the_compiler_keeps(precision, residual_precision):
    config = composed_config(["model=cucafera"])
    kept = load_script("memory").kept_by_compiled_layer(config, 1, precision, residual_precision)
    step = StepMemory(config, precision, residual_precision, compiled=True)
    estimate = step.per_token(checkpointing=False) / (config.model.num_hidden_layers * config.model.hidden_size)
    assert kept == pytest.approx(estimate, rel=0.02)


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that the machine has a GPU."""

    def install(gigabytes: float) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(gigabytes * 1e9),) * 2)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        properties = SimpleNamespace(total_memory=gigabytes * 1e9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    return install


@pytest.mark.parametrize(
    ("gigabytes", "checkpointing", "windows"),
    [(7, True, 4), (8, False, 1), (16, False, 4), (24, False, 8), (80, False, 32)],
)
def test_what_is_left_to_the_program_fits_the_gpu(gpu, gigabytes, checkpointing, windows):
    gpu(gigabytes)
    config = composed_config(["+experiment=pretrain", "trainer=small_gpu"])
    hardware = decide_hardware(config)
    assert (hardware.activation_checkpointing, hardware.micro_batch_windows) == (checkpointing, windows)
    step = StepMemory(config, hardware.precision, hardware.residual_precision, compiled=True)
    needed = step.at(windows * config.sequence_length, hardware.activation_checkpointing)
    assert needed < USABLE_MEMORY * gigabytes * 1e9
    assert config.model == CUCAFERA


def test_windows_that_are_asked_for_turn_checkpointing_on_if_they_need_it(gpu):
    gpu(24)
    wanted = ["+experiment=pretrain", "trainer.micro_batch_windows=16"]
    assert decide_hardware(composed_config(wanted)).activation_checkpointing
    wanted.append("trainer.activation_checkpointing=false")
    assert not decide_hardware(composed_config(wanted)).activation_checkpointing


@pytest.fixture
def little_memory(monkeypatch):
    """Pretends that a training step with more windows at a time, or without checkpointing, takes too much memory."""
    forward = Decoder.forward
    failures: list[int] = []

    def install(windows: int, only_checkpointing: bool = False) -> list[int]:
        def limited(model, input_ids, targets=None, *arguments, **settings):
            too_much = len(input_ids) > windows or (only_checkpointing and not model.activation_checkpointing)
            if targets is not None and too_much:
                failures.append(len(input_ids))
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(model, input_ids, targets, *arguments, **settings)

        monkeypatch.setattr(Decoder, "forward", limited)
        return failures

    return install


def test_out_of_memory_means_fewer_windows_at_a_time_and_the_run_remembers(small_run, little_memory, caplog):
    train(small_run("name=given", "trainer.micro_batch_windows=2"), [])
    failures = little_memory(windows=2)
    train(small_run("name=found", "budget_tokens=2048", "schedule.horizon_steps=12"), [])
    assert failures == [8, 4]
    assert "too little memory for 8 windows at a time: on with 4 at a time" in caplog.text
    noted = [line["hardware"]["micro_batch_windows"] for line in history_of("found") if "out of" in line["what"]]
    assert noted == [8, 4]

    train(small_run("name=found", "schedule.horizon_steps=12"), [])
    assert failures == [8, 4]
    assert_equal(weights("outputs/given"), weights("outputs/found"))

    train(small_run("name=found", "model.num_hidden_layers=1", "resume=overwrite"), [])
    assert failures == [8, 4, 8, 4]  # another model may need less


def test_what_was_too_much_for_a_whole_model_on_each_device_is_not_too_much_for_a_share(tmp_path):
    folder = RunFolder(tmp_path)
    ddp, fsdp = (composed_config([f"trainer.strategy={strategy}"]) for strategy in ("ddp", "fsdp"))
    folder.note_out_of_memory(ddp, decide_hardware(ddp))
    assert folder.ran_out_of_memory(ddp, decide_hardware(ddp))
    assert not folder.ran_out_of_memory(fsdp, decide_hardware(fsdp))


def test_out_of_memory_with_one_window_means_activation_checkpointing(small_run, little_memory):
    train(small_run("name=given", "trainer.micro_batch_windows=1"), [])
    assert little_memory(windows=1, only_checkpointing=True) == []
    train(small_run("name=found"), [])
    assert_equal(weights("outputs/given"), weights("outputs/found"))


def test_out_of_memory_in_the_middle_of_a_run_does_not_erase_it(small_run, little_memory, monkeypatch):
    train(small_run("name=given", "trainer.micro_batch_windows=4"), [])
    failures = little_memory(windows=8)
    install_once = iter([True])
    item = TrainingSteps.__getitem__

    def item_and_less_memory(steps, step):
        if step == 9 and next(install_once, False):
            little_memory(windows=4)
        return item(steps, step)

    monkeypatch.setattr(TrainingSteps, "__getitem__", item_and_less_memory)
    train(small_run("name=found", "resume=overwrite"), [])
    assert failures == [8]
    notes = [(line["what"], line.get("step")) for line in history_of("found")]
    assert notes == [("began", 0), ("out of memory", None), ("went on", 8), ("completed", 12)]


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (["trainer.micro_batch_windows=8"], "8 windows at a time: set trainer.micro_batch_windows=auto or to less"),
        (
            ["trainer.activation_checkpointing=false"],
            "1 window at a time: set trainer.activation_checkpointing=auto, or choose a smaller model",
        ),
    ],
)
def test_what_cannot_be_made_smaller_is_told(small_run, little_memory, settings, advice):
    little_memory(windows=0)
    with pytest.raises(UserError, match=advice):
        train(small_run("name=run", "trainer.activation_checkpointing=false", *settings), [])
