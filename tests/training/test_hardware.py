"""GPU discovery, its messages, and the trainer settings that are resolved for a machine."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from cucafera import device
from cucafera.config.command_line import composed_config
from cucafera.config.errors import UserError
from cucafera.device import find_gpu, has_kernels_for, resolve_device
from cucafera.model.flops import peak_flops
from cucafera.training.hardware import Hardware, decide_hardware

TOO_OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx "
    "Alternatively, go to: https://pytorch.org to install a PyTorch version that has been compiled with your version "
    "of the CUDA driver. (Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:119.)"
)
NOT_INITIALIZED = (
    "CUDA initialization: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
    "NumCudaDevices() that might have already set an error? Error 802: system not yet initialized (Triggered "
    "internally at /pytorch/c10/cuda/CUDAFunctions.cpp:119.)"
)
CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
GIGABYTE = 10**9


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Make PyTorch find no GPU, by default on a machine with a driver and with a build for CUDA 13.0."""

    def install(driver: bool = True, built_for: str | None = "13.0", warning: str | None = None) -> None:
        def is_available() -> bool:
            if warning:
                warnings.warn(warning, stacklevel=1)
            return False

        (tmp_path / "driver").touch()
        monkeypatch.setattr(device, "DRIVER_FILES", (tmp_path / "nowhere", *([tmp_path / "driver"] * driver)))
        monkeypatch.setattr(torch.version, "cuda", built_for)
        monkeypatch.setattr(torch.cuda, "is_available", is_available)

    return install


@pytest.fixture
def card(monkeypatch):
    """Give the machine a GPU."""

    def install(
        name: str = "NVIDIA A100-SXM4-80GB",
        capability: tuple[int, int] = (8, 0),
        architectures: tuple[str, ...] = CUDA_13,
        free: float = 79.5,
        total: float = 80,
        count: int = 1,
        error: Exception | None = None,
    ) -> list[int]:
        asked: list[int] = []

        def mem_get_info(device: int) -> tuple[int, int]:
            asked.append(device)
            if error:
                raise error
            return int(free * GIGABYTE), int(total * GIGABYTE)

        properties = SimpleNamespace(total_memory=int(total * GIGABYTE))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(architectures))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        return asked

    return install


def decided(*overrides: str, environment: dict[str, str] | None = None) -> Hardware:
    return decide_hardware(composed_config(list(overrides)), environment)


UNUSABLE = {
    "a build without CUDA": (
        {"built_for": None}, {}, r"PyTorch \S+ is a build without CUDA, although .* --force-reinstall torch",
    ),
    "a driver that is too old": (
        {"warning": TOO_OLD}, {}, r"too old for PyTorch .* 11\.4 \(found version 11040\), and this build needs 13\.0",
    ),
    "another failure": (
        {"warning": NOT_INITIALIZED}, {}, r"CUDA does not start .*Error 802: system not yet initialized$",
    ),
    "a failure without a sign of a driver": (
        {"warning": NOT_INITIALIZED, "driver": False}, {}, r"CUDA does not start",
    ),
    "all GPUs hidden": ({}, {"CUDA_VISIBLE_DEVICES": ""}, r"CUDA_VISIBLE_DEVICES is empty, which hides every GPU"),
    "none chosen": ({}, {"CUDA_VISIBLE_DEVICES": "-1"}, r"CUDA_VISIBLE_DEVICES is -1, which hides every GPU"),
    "one that is not there": (
        {}, {"CUDA_VISIBLE_DEVICES": "7"}, r"CUDA_VISIBLE_DEVICES is 7, and this process sees no such GPU",
    ),
    "a container that was given none": ({}, {}, r"this process sees no GPU: start a container with --gpus all"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "environment", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_gpu_is_reported_in_one_line_with_the_reason(machine, caplog, settings, environment, reason):
    machine(**settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch's own warning is not shown as well
        with pytest.raises(UserError, match=reason) as refused:
            decided("trainer.accelerator=cuda", environment=environment)
        with pytest.raises(UserError, match=f"--device cuda: .*{reason}") as refused_device:
            resolve_device("cuda", environment)
        assert not caplog.records
        assert decided("trainer.accelerator=auto", environment=environment).accelerator == "cpu"
        assert resolve_device("auto", environment) == torch.device("cpu")
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(":")[0] for message in messages] == [
        "Training on the CPU (trainer.accelerator=auto)", "Computing on the CPU",
    ]  # fmt: skip
    problem = find_gpu(environment).problem
    assert all(problem in text for text in (*messages, str(refused.value), str(refused_device.value)))
    assert "\n" not in str(refused.value) and "Triggered" not in problem


@pytest.mark.parametrize("settings", [{"built_for": None}, {}])
def test_a_machine_without_a_gpu_trains_on_the_cpu_silently(machine, caplog, settings):
    machine(driver=False, **settings)
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    assert decided(environment=hidden).accelerator == "cpu"
    assert resolve_device("auto", hidden) == torch.device("cpu")
    assert not caplog.records
    with pytest.raises(UserError, match=r"this machine has none that PyTorch can use$"):
        decided("trainer.accelerator=cuda", environment=hidden)
    with pytest.raises(UserError, match="--device cuda: this machine has no CUDA GPU that PyTorch can use"):
        resolve_device("cuda", hidden)


def test_training_on_the_cpu_does_not_query_cuda(machine, caplog):
    machine(built_for=None)
    assert decided("trainer=cpu").accelerator == "cpu"
    assert resolve_device("cpu", {}) == torch.device("cpu")
    assert not caplog.records


@pytest.mark.parametrize(
    "environment", [{"RANK": "1"}, {"LOCAL_RANK": "2"}, {"SLURM_PROCID": "3"}, {"RANK": "0", "NODE_RANK": "1"}]
)
def test_only_the_first_process_of_a_job_warns(machine, caplog, environment):
    machine()
    assert decided(environment=environment).accelerator == "cpu"
    assert not caplog.records
    decided(environment={"RANK": "0", "LOCAL_RANK": "0", "NODE_RANK": "0"})
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((7, 0), CUDA_13, False),  # V100
        ((7, 5), CUDA_13, True),
        ((8, 0), CUDA_13, True),
        ((8, 9), CUDA_13, True),  # by sm_86
        ((10, 3), CUDA_13, True),
        ((11, 0), CUDA_13, False),
        ((11, 0), (*CUDA_13, "compute_120"), False),
        ((12, 1), ("sm_90", "compute_90"), True),
        ((9, 0), ("sm_90a",), True),
        ((9, 1), ("sm_90a", "compute_90a"), False),
        ((10, 3), ("sm_100f",), True),
        ((11, 0), ("compute_100f",), False),
        ((8, 0), ("sm_86",), False),
    ],
)
def test_machine_code_runs_within_a_major_version_and_ptx_on_all_later_ones(capability, architectures, expected):
    assert has_kernels_for(capability, architectures) is expected


def test_a_gpu_without_kernels_in_this_build_is_refused_by_name(card, caplog):
    card("Tesla V100-SXM2-16GB", (7, 0))
    message = (
        r"Tesla V100-SXM2-16GB has compute capability 7\.0, and PyTorch \S+ has kernels for sm_75 sm_80 .* sm_120 only"
    )
    with pytest.raises(UserError, match=message):
        decided("trainer.accelerator=cuda")
    with pytest.raises(UserError, match=message):
        resolve_device("cuda", {})
    assert decided().accelerator == "cpu"
    assert "Training on the CPU (trainer.accelerator=auto): Tesla V100" in caplog.text


@pytest.mark.parametrize(("name", "capability"), [("Tesla T4", (7, 5)), ("Tesla V100-SXM2-16GB", (7, 0))])
def test_a_gpu_without_bf16_trains_in_fp32_and_warns_of_the_cost(card, caplog, name, capability):
    card(name, capability, architectures=("sm_70", "sm_75"), free=15.5, total=16)
    assert decided("trainer.accelerator=cuda", "trainer.precision=auto").precision == "fp32"
    (record,) = caplog.records
    assert f"{name} has no bf16 (compute capability 8): training in fp32; fp16 is not offered" in record.getMessage()
    assert "\n" not in record.getMessage()
    with pytest.raises(UserError, match=r"has no bf16 .*: set trainer\.precision=fp32"):
        decided("trainer.accelerator=cuda", "trainer.precision=bf16")
    caplog.clear()
    assert decided("trainer.accelerator=cuda", "trainer.precision=fp32").precision == "fp32"
    assert not caplog.records


def test_a_free_gpu_is_used_completely(card, caplog):
    asked = card()
    found = decided("+experiment=pretrain", "trainer=small_gpu")
    assert (found.accelerator, found.precision, found.peak_flops) == ("cuda", "bf16", 312e12)
    assert resolve_device("auto", {}) == resolve_device("cuda", {}) == torch.device("cuda")
    assert set(asked) == {0}
    assert not caplog.records


def test_a_gpu_that_others_use_gets_a_micro_batch_for_its_free_memory(card, caplog):
    card(free=24, total=80)
    shared = decided("+experiment=pretrain", "trainer=small_gpu")
    (record,) = caplog.records
    assert record.getMessage() == (
        "Other processes use 56.0 GB of the 80.0 GB of GPU 0 (NVIDIA A100-SXM4-80GB): the micro-batch is chosen "
        "for the rest."
    )
    caplog.clear()
    card(free=24, total=24)
    alone = decided("+experiment=pretrain", "trainer=small_gpu")
    assert shared.micro_batch_windows == alone.micro_batch_windows
    assert shared.activation_checkpointing == alone.activation_checkpointing
    assert not caplog.records
    card(free=24, total=80)
    decided("+experiment=pretrain", "trainer=small_gpu", "trainer.micro_batch_windows=16")
    assert caplog.messages[-1].endswith("training may run out of memory.")


def test_devices_of_one_job_choose_the_same_micro_batch(card, caplog):
    job = ["+experiment=pretrain", "trainer=ddp", "trainer.devices=2"]
    card(count=2)
    alone = decided(*job)
    asked = card(count=2, free=24)
    assert decided(*job, environment={"LOCAL_RANK": "1"}) == decided(*job, environment={"LOCAL_RANK": "0"}) == alone
    assert asked == [1, 0]  # each process its own: CUDA would make a context on every GPU that is asked
    assert [message.split(": ")[-1] for message in caplog.messages] == ["training may run out of memory."]


@pytest.mark.parametrize(
    ("windows", "length", "devices", "micro_batch"),
    [
        (8, 256, 1, 8),  # all of them fit: 16 windows of 256 tokens would
        (8, 256, 2, 4),  # and no device has more than its share
        (8, 256, 8, 1),
        (32, 512, 1, 8),
        (32, 512, 2, 8),
        (12, 1024, 1, 4),
        (18, 1024, 1, 3),  # a divisor near to what fits, for micro-batches of one size
        (14, 1024, 1, 4),  # none is near: 2 would be half
        (10, 1024, 2, 4),
        (2, 8192, 1, 1),
    ],
)
def test_a_micro_batch_is_a_share_of_the_windows_of_one_device(monkeypatch, windows, length, devices, micro_batch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    config = composed_config(
        ["trainer=cpu", f"trainer.devices={devices}", f"batch_tokens={windows * length}",
         f"model.max_position_embeddings={length}", "budget_tokens=1e7"]
    )  # fmt: skip
    assert decide_hardware(config).micro_batch_windows == micro_batch


@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
@pytest.mark.parametrize("accelerator", ["cuda", "auto"])
def test_a_gpu_that_accepts_no_further_process_is_refused_in_one_line(card, kind, accelerator):
    for error, message in (
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA kernel errors", "exclusive compute mode"),
        ("CUDA error: out of memory\nCUDA kernel errors", "other processes have taken all of the GPU's memory"),
    ):
        card(error=kind(error))
        for call in (lambda: decided(f"trainer.accelerator={accelerator}"), lambda: resolve_device(accelerator, {})):
            with pytest.raises(UserError, match=message) as refused:
                call()
            assert "\n" not in str(refused.value)
    card(error=kind("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal"):
        decided("trainer.accelerator=cuda")


def test_a_mig_slice_is_one_device_without_a_known_peak(card):
    name = "NVIDIA A100-SXM4-80GB MIG 3g.40gb"
    assert peak_flops(name) is None
    card(name, free=39.8, total=40)
    found = decided("+experiment=pretrain", "trainer=small_gpu")
    assert (found.name, found.peak_flops, found.devices) == (name, None, 1)
    assert decided("+experiment=pretrain", "trainer=ddp").devices == 1
    for count, devices in ((1, "2"), (2, "2"), (2, "auto")):
        card(name, free=39.8, total=40, count=count)
        with pytest.raises(
            UserError, match=rf"^trainer\.devices is {devices}; {name} is a slice .* trainer\.devices=1$"
        ):
            decided("+experiment=pretrain", "trainer=ddp", f"trainer.devices={devices}")


def test_a_residual_stream_in_bf16_needs_layers_in_bf16():
    fp32 = ["trainer=cpu", "trainer.precision=fp32"]
    with pytest.raises(UserError, match=r"trainer\.residual_precision is bf16, but training is in fp32"):
        decide_hardware(composed_config([*fp32, "trainer.residual_precision=bf16"]))
    assert decide_hardware(composed_config(fp32)).residual_precision == "fp32"
    bf16 = ["trainer=cpu", "trainer.precision=bf16", "trainer.residual_precision=bf16"]
    assert decide_hardware(composed_config(bf16)).residual_precision == "bf16"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["trainer.document_attention=flash"],
            r"needs a CUDA GPU of compute capability 8\.0, bf16 and heads of a multiple",
        ),
        (["trainer.document_attention=flash3"], r"document_attention=flash3 needs a CUDA GPU"),
        (["trainer.document_attention=flex"], "needs a CUDA GPU and heads of at least 16"),
    ],
)
def test_an_attention_kernel_that_this_machine_lacks_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        decide_hardware(composed_config(["trainer=cpu", *settings]))


@pytest.mark.parametrize(
    ("name", "capability", "message"),
    [
        ("flash3", (8, 0), r"A100 has compute capability 8\.0, and it needs 9\.0"),
        ("flash4", (12, 0), r"A100 has compute capability 12\.0, and it needs 9\.0 or 10\.0"),
        ("flash3", (9, 0), "its kernels, the module flash_attn_interface, cannot be loaded: No module named"),
    ],
)
def test_unavailable_flash_attention_3_and_4_are_refused_with_the_reason(name, capability, message):
    from cucafera.model.flash_attention import activate_flash_attention

    with pytest.raises(UserError, match=message):
        activate_flash_attention(name, "A100", capability)


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_a_rank_that_is_not_a_number_is_refused_before_lightning_is_imported(variable):
    with pytest.raises(UserError, match=f"variable {variable} is 'two', not a number"):
        decide_hardware(composed_config([]), {variable: "two"})
