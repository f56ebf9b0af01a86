"""Memory: the formula of a step, the settings chosen by it, running out of memory, and free main memory."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch

from cucafera.config.command_line import composed_config
from cucafera.config.errors import UserError
from cucafera.config.registry import OPTIMIZERS
from cucafera.config.schema import Config
from cucafera.data.windows import TrainingSteps
from cucafera.model.flops import adapter_parameter_count, block_matrix_parameter_count, parameter_count
from cucafera.model.loss import LOGITS_BYTES
from cucafera.model.transformer import Decoder
from cucafera.run import train
from cucafera.runs.folder import RunFolder
from cucafera.training.hardware import decide_hardware
from cucafera.training.memory import CGROUP_FILES, USABLE_MEMORY, StepMemory, _cgroup_headroom, free_memory_bytes
from tests.support import CUCAFERA, ROOT, assert_equal, history_of, load_script, weights

SHALLOW = [
    "model.vocab_size=4096", "model.hidden_size=256", "model.intermediate_size=704", "model.num_hidden_layers=4",
    "model.num_attention_heads=4", "model.max_position_embeddings=2048", "batch_tokens=2048",
    "tokenizer.vocab_size=1024",
]  # fmt: skip


def adamw_bytes(config: Config) -> int:
    """Return the bytes of AdamW's state."""
    return OPTIMIZERS.get("adamw").state_bytes(config)


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
def test_the_memory_formula_agrees_with_what_a_step_allocates(precision, checkpointing):
    config, windows = composed_config(SHALLOW), 16
    computed = load_script("memory").computed_peak(config, windows, precision, checkpointing)
    estimate = StepMemory(config, precision, adamw_bytes(config)).peak_bytes(windows * 2048, checkpointing)
    # With checkpointing, the loss and the recomputed layer never need their memory at the same time.
    assert 0.93 * computed < estimate < (1.4 if checkpointing else 1.07) * computed


@pytest.mark.slow
@pytest.mark.parametrize(("model", "gigabytes"), [("cucafera", 8), ("large", 24)])
def test_a_step_with_activation_checkpointing_fits_a_small_gpu(model, gigabytes):
    config = composed_config([f"model={model}", "batch_tokens=2048"])
    peak = load_script("memory").computed_peak(config, 1, "bf16", True)
    assert peak < USABLE_MEMORY * gigabytes * 1e9
    page = (ROOT / "cucafera" / "training" / "README.md").read_text(encoding="utf-8")
    assert f"{peak / 2**30:.2f} GiB: fits {gigabytes} GB" in page


def test_fsdp_shards_weights_and_optimizer_state_in_the_memory_formula():
    ddp, fsdp = (composed_config(["+experiment=pretrain", f"trainer={strategy}"]) for strategy in ("ddp", "fsdp"))
    alone, together = (
        StepMemory(ddp, "fp32", adamw_bytes(ddp)),
        StepMemory(fsdp, "fp32", adamw_bytes(fsdp), world_size=8),
    )
    assert alone.fixed_bytes == StepMemory(ddp, "fp32", adamw_bytes(ddp), world_size=8).fixed_bytes
    assert alone.fixed_bytes == StepMemory(fsdp, "fp32", adamw_bytes(fsdp)).fixed_bytes
    head = 4 * 65_536 * 768  # gathered in full while it is used
    assert alone.fixed_bytes - together.fixed_bytes == 12 * parameter_count(ddp.model) * 7 // 8 - head
    assert alone.bytes_per_token(False) == together.bytes_per_token(False)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_formula_counts_the_state_that_the_optimizer_says(optimizer):
    config = composed_config(["model=cucafera", "batch_tokens=2048", f"optimizer={optimizer}"])
    state_bytes = OPTIMIZERS.get(optimizer).state_bytes(config)
    assert (
        StepMemory(config, "fp32", state_bytes).fixed_bytes - StepMemory(config, "fp32", 0).fixed_bytes == state_bytes
    )
    moments = {"adamw": 2, "muon": 1}[optimizer]
    gigabytes = 4 * (moments * block_matrix_parameter_count(config.model) + 2 * 65_536 * 768) / 1e9
    assert state_bytes / 1e9 == pytest.approx(gigabytes, rel=2e-3)  # and the gains; Muon's rows


@pytest.mark.parametrize(
    ("precision", "residual_precision"),
    [
        ("bf16", "bf16"),
        pytest.param("bf16", "fp32", marks=pytest.mark.slow),
        pytest.param("fp32", "fp32", marks=pytest.mark.slow),
    ],
)
def test_the_memory_formula_agrees_with_what_a_compiled_layer_keeps(precision, residual_precision):
    config = composed_config(["model=cucafera", "batch_tokens=2048"])
    kept = load_script("memory").kept_by_compiled_layer(config, 1, precision, residual_precision)
    step = StepMemory(config, precision, adamw_bytes(config), residual_precision, compiled=True)
    estimate = step.bytes_per_token(checkpointing=False) / (config.model.num_hidden_layers * config.model.hidden_size)
    assert kept == pytest.approx(estimate, rel=0.02)


@pytest.fixture
def gpu(monkeypatch):
    """Give the machine a GPU."""

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
def test_settings_chosen_automatically_fit_the_gpu(gpu, gigabytes, checkpointing, windows):
    gpu(gigabytes)
    config = composed_config(["+experiment=pretrain_adamw", "trainer=small_gpu"])
    hardware = decide_hardware(config)
    assert (hardware.activation_checkpointing, hardware.micro_batch_windows) == (checkpointing, windows)
    step = StepMemory(config, hardware.precision, adamw_bytes(config), hardware.residual_precision, compiled=True)
    needed = step.peak_bytes(windows * config.sequence_length, hardware.activation_checkpointing)
    assert needed < USABLE_MEMORY * gigabytes * 1e9
    assert config.model == CUCAFERA


def test_a_given_micro_batch_turns_checkpointing_on_if_it_needs_it(gpu):
    gpu(24)
    overrides = ["+experiment=pretrain", "trainer.micro_batch_windows=16"]
    assert decide_hardware(composed_config(overrides)).activation_checkpointing
    overrides.append("trainer.activation_checkpointing=false")
    assert not decide_hardware(composed_config(overrides)).activation_checkpointing


@pytest.fixture
def little_memory(monkeypatch):
    """Let a training step with more windows, or without checkpointing, run out of memory."""
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


def test_out_of_memory_halves_the_micro_batch_and_the_run_remembers_it(small_run, little_memory, caplog):
    train(small_run("name=given", "trainer.micro_batch_windows=2"), [])
    failures = little_memory(windows=2)
    train(small_run("name=found", "budget_tokens=2048", "schedule.horizon_steps=12"), [])
    assert failures == [8, 4]
    assert "too little memory for 8 windows at a time: continuing with 4 at a time" in caplog.text
    noted = [line["hardware"]["micro_batch_windows"] for line in history_of("found") if "out of" in line["event"]]
    assert noted == [8, 4]

    train(small_run("name=found", "schedule.horizon_steps=12"), [])
    assert failures == [8, 4]
    assert_equal(weights("outputs/given"), weights("outputs/found"))

    train(small_run("name=found", "model.num_hidden_layers=1", "resume=overwrite"), [])
    assert failures == [8, 4, 8, 4]  # another model may need less


def test_out_of_memory_under_ddp_says_nothing_about_fsdp(tmp_path):
    folder = RunFolder(tmp_path)
    ddp, fsdp = (composed_config([f"trainer.strategy={strategy}"]) for strategy in ("ddp", "fsdp"))
    folder.note_out_of_memory(ddp, dataclasses.asdict(decide_hardware(ddp)))
    assert folder.ran_out_of_memory(ddp, dataclasses.asdict(decide_hardware(ddp)))
    assert not folder.ran_out_of_memory(fsdp, dataclasses.asdict(decide_hardware(fsdp)))


@pytest.mark.parametrize(
    "other",
    [["sequence_length=128"], ["model.num_hidden_layers=2"], ["trainer.micro_batch_windows=2"],
     ["adapter.rank=4", "init_from=x"], ["trainer.strategy=fsdp"], ["trainer.precision=bf16"]],
)  # fmt: skip
def test_out_of_memory_says_nothing_about_a_step_that_needs_another_amount(tmp_path, other):
    def facts(*overrides: str):
        config = composed_config(["trainer=cpu", "batch_tokens=2048", "trainer.micro_batch_windows=4", *overrides])
        return config, dataclasses.asdict(decide_hardware(config))

    folder = RunFolder(tmp_path)
    assert not folder.ran_out_of_memory(*facts())
    folder.note_out_of_memory(*facts())
    assert folder.ran_out_of_memory(*facts())
    assert folder.ran_out_of_memory(*facts("optimizer.lr=1e-4", "seed=3"))
    assert not folder.ran_out_of_memory(*facts(*other))


def test_next_to_adapters_weights_have_no_gradient_and_no_state():
    config = composed_config(["model=cucafera", "batch_tokens=2048", "adapter.rank=8", "init_from=x"])
    full = composed_config(["model=cucafera", "batch_tokens=2048"])
    parameters, head = parameter_count(full.model), 65_536 * 768
    adapters = adapter_parameter_count(config.model, config.adapter)
    alone, adapted = (StepMemory(each, "fp32", adamw_bytes(each)).fixed_bytes for each in (full, config))
    # weights, gradients and two moments in fp32; one chunk of logits; and the head's own gradient
    assert alone == 16 * parameters + LOGITS_BYTES["cuda"] + 4 * head
    assert adapted == 4 * parameters + 16 * adapters + LOGITS_BYTES["cuda"]


def test_out_of_memory_with_one_window_turns_activation_checkpointing_on(small_run, little_memory):
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
    notes = [(line["event"], line.get("step")) for line in history_of("found")]
    assert notes == [
        ("started", 0), ("first checkpoint", 4), ("out of memory", None), ("resumed", 8), ("completed", 12),
    ]  # fmt: skip


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
def test_out_of_memory_with_fixed_settings_is_refused_with_advice(small_run, little_memory, settings, advice):
    little_memory(windows=0)
    with pytest.raises(UserError, match=advice):
        train(small_run("name=run", "trainer.activation_checkpointing=false", *settings), [])


def test_free_memory_is_a_number_of_bytes():
    assert 1 << 20 < free_memory_bytes() < 1 << 50


@pytest.mark.parametrize(("controllers", "version"), [("", ""), ("cpu,memory", "memory")])
def test_every_cgroup_around_the_process_limits_its_memory(tmp_path, controllers, version):
    files = CGROUP_FILES[version]
    for folder, content in (("", "max"), ("slurm/job_7", "1000"), ("slurm/job_7/step_0", "900")):
        group = tmp_path / "groups" / folder
        group.mkdir(parents=True, exist_ok=True)
        (group / files.limit).write_text(content + "\n")
        (group / files.usage).write_text("850\n")
        (group / "memory.stat").write_text(f"anon 800\n{files.reclaimable} 30\n")
    (tmp_path / files.limit).write_text("1")  # not in the hierarchy
    (tmp_path / "cgroup").write_text(f"3:pids:/\n2:{controllers}:/slurm/job_7/step_0/task_1\n")
    mounted = {version: files._replace(root=str(tmp_path / "groups"))}
    assert list(_cgroup_headroom(tmp_path / "cgroup", mounted)) == [900 - 850 + 30, 1000 - 850 + 30]


def test_a_system_without_cgroups_has_no_limit(tmp_path):
    assert list(_cgroup_headroom(tmp_path / "nowhere", CGROUP_FILES)) == []
