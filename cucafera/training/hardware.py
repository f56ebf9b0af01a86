"""What the trainer presets mean on the machine at hand."""

import contextlib
import dataclasses
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from cucafera.config import Config, UserError
from cucafera.model.attention import SMALLEST_FLEX_HEAD, document_attention
from cucafera.model.flops import adapter_parameter_count, parameter_count, peak_flops
from cucafera.model.loss import LOGITS_BYTES

log = logging.getLogger(__name__)

DRIVER_FILES = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"), Path("/usr/lib/wsl/lib/libcuda.so.1"))
"""One of them exists where an NVIDIA driver is loaded; the last is that of Windows Subsystem for Linux."""
GET_STARTED = "see pytorch.org/get-started"
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
"""Of torchrun, Lightning and SLURM; the first that is set counts, as for Lightning."""
CONTEXT_BYTES = 1 << 30
"""GPU memory that is not taken for another process's: more than the CUDA context of this process."""
MEMORY_GROUPS = {
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file "),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
}
"""By the name of the controller, none in version 2 of Linux's control groups: where they lie, the files with limit and
use, and what begins the line of memory.stat with the part of the use that the system gives up when asked."""
MICRO_BATCH_TOKENS_CPU = 4096
"""More gain nothing on a CPU."""
ACTIVATION_BYTES = {("bf16", False): 54, ("fp32", False): 80, ("bf16", True): 37, ("fp32", True): 66}
"""What a layer keeps for its backward pass, per token and unit of width, by precision and whether it is compiled; with
the residual stream in fp32. See `scripts/memory.py`."""
RESIDUAL_PLACES = 2
"""Of the residual stream in a layer that are kept: before attention and before the MLP."""
USABLE_MEMORY = 0.88
"""Of a GPU's; the rest is for the context and for what is lost between the pieces."""


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The trainer's settings with every `auto` decided.

    Attributes:
        accelerator: cpu or cuda.
        name: The device in words.
        devices: Devices of one node.
        world_size: Devices of the job.
        precision: fp32 or bf16.
        compile: Whether the model is compiled.
        document_attention: What computes attention within documents: one of `attention.DOCUMENT_ATTENTION`, or flash3
            or flash4.
        residual_precision: Of the residual stream: fp32 or bf16.
        micro_batch_windows: Windows of one forward pass, all but the last of a step.
        activation_checkpointing: Whether activations are computed again in the backward pass.
        num_workers: Processes that read windows.
        peak_flops: Dense bf16 peak of one device in FLOP/s; None where it is not known.
    """

    accelerator: str
    name: str
    devices: int
    world_size: int
    precision: str
    compile: bool
    document_attention: str
    residual_precision: str
    micro_batch_windows: int
    activation_checkpointing: bool
    num_workers: int
    peak_flops: float | None

    def with_less_memory(self, config: Config) -> "Hardware | None":
        """The next to try when this takes too much memory; None if the settings allow nothing smaller.

        First half the windows of a forward pass, then activation checkpointing.
        """
        if self.micro_batch_windows > 1 and config.trainer.micro_batch_windows == "auto":
            return dataclasses.replace(self, micro_batch_windows=self.micro_batch_windows // 2)
        if not self.activation_checkpointing and config.trainer.activation_checkpointing == "auto":
            return dataclasses.replace(self, activation_checkpointing=True)
        return None


class FoundGpu(NamedTuple):
    """What `find_gpu` finds.

    Attributes:
        usable: Whether PyTorch can compute on a GPU here.
        problem: Why it cannot, and what to do, where something hints at a GPU; None: nothing does, or it can.
    """

    usable: bool
    problem: str | None


def find_gpu(environment: Mapping[str, str]) -> FoundGpu:
    """Looks for a GPU that the installed PyTorch can use.

    Args:
        environment: The environment variables of the process: CUDA_VISIBLE_DEVICES may hide a GPU.

    Raises:
        UserError: the GPU lets no further process in.
    """
    with warnings.catch_warnings(record=True) as caught:  # PyTorch says only in a warning why there is no GPU
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        problem = _architecture_problem()
        return FoundGpu(problem is None, problem)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return FoundGpu(False, _why_unavailable(visible, [str(warning.message) for warning in caught]))


def _why_unavailable(visible_devices: str | None, cuda_warnings: Sequence[str]) -> str | None:
    """Why torch.cuda is not available, from what it warned of; None if there is no sign of a GPU."""
    has_driver = any(path.exists() for path in DRIVER_FILES)
    if torch.version.cuda is None:
        if not has_driver:
            return None
        return (
            f"PyTorch {torch.__version__} is a build without CUDA, although this machine has an NVIDIA driver: install "
            f"the CUDA build (pip install --force-reinstall torch --index-url URL; for the URL {GET_STARTED})"
        )
    for warning in cuda_warnings:
        if found := re.search(r"driver on your system is too old \(found version (\d+)\)", warning):
            version = int(found[1])
            return (
                f"the NVIDIA driver is too old for PyTorch {torch.__version__}: it knows CUDA {version // 1000}."
                f"{version % 1000 // 10} (found version {version}), and this build needs {torch.version.cuda}: update "
                f"the driver, or install a build of torch for an older CUDA, {GET_STARTED}"
            )
        text = " ".join(warning.split(" (Triggered internally")[0].removeprefix("CUDA initialization: ").split())
        return f"CUDA does not start (see whether nvidia-smi lists the GPU): {text}"
    if not has_driver:
        return None
    advice = "start a container with --gpus all, a SLURM job with --gres=gpu:1"
    if visible_devices is None:
        return f"the system has an NVIDIA driver, but this process sees no GPU: {advice}"
    if not visible_devices.strip() or visible_devices.startswith("-"):
        value = visible_devices.strip() or "empty"
        return f"CUDA_VISIBLE_DEVICES is {value}, which hides every GPU: unset it, or give numbers of nvidia-smi -L"
    return (
        f"CUDA_VISIBLE_DEVICES is {visible_devices}, and this process sees no such GPU: give numbers of nvidia-smi -L; "
        f"if that lists none, {advice}"
    )


def _architecture_problem() -> str | None:
    """Says so if this build of PyTorch has no kernels for the GPU."""
    if torch.version.cuda is None:  # ROCm has other names
        return None
    with warnings.catch_warnings(), _gpu_errors_in_a_line():
        warnings.simplefilter("ignore")  # PyTorch says the same in several lines
        capability, architectures = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    if not architectures or has_kernels_for(capability, architectures):
        return None
    return (
        f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, and PyTorch "
        f"{torch.__version__} has kernels for {' '.join(architectures)} only: install a build of torch that has them "
        f"for this GPU, {GET_STARTED}"
    )


def has_kernels_for(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a GPU of this compute capability can run kernels that were compiled for these architectures.

    sm_XY, machine code, runs on X.Y and later ones of the same major version. compute_XY, PTX, is compiled for any
    later one when it is first used. With an "a" behind it either is for X.Y alone, with an "f" for its major version.
    """
    for name in architectures:
        if found := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name):
            kind, suffix, compiled_for = found[1], found[4], (int(found[2]), int(found[3]))
            if suffix == "a":
                fits = capability == compiled_for
            else:
                same_major = capability[0] == compiled_for[0]
                fits = capability >= compiled_for and (same_major or (kind == "compute" and not suffix))
            if fits:
                return True
    return False


@contextlib.contextmanager
def _gpu_errors_in_a_line() -> Iterator[None]:
    """Raises UserError if the GPU lets this process not in."""
    try:
        yield
    except RuntimeError as error:  # torch.AcceleratorError and torch.OutOfMemoryError are of this kind
        advice = "wait for the processes that nvidia-smi shows, or name another GPU in CUDA_VISIBLE_DEVICES"
        if "busy or unavailable" in str(error):
            raise UserError(
                f"the GPU is in use and in exclusive compute mode, for one process only: {advice}"
            ) from error
        if "out of memory" in str(error):
            raise UserError(f"other processes have taken all of the GPU's memory: {advice}") from error
        raise


def memory_taken(device: int) -> int:
    """Bytes of a GPU's memory that other processes have taken; 0 if that is little. Raises UserError if all is."""
    with _gpu_errors_in_a_line():
        free, total = torch.cuda.mem_get_info(device)
        taken = total - free - torch.cuda.memory_reserved(device)
    return taken if taken > max(CONTEXT_BYTES, 0.05 * total) else 0


def is_mig_slice(device_name: str) -> bool:
    """Whether a device is a part of a card, such as "NVIDIA A100-SXM4-80GB MIG 3g.40gb"."""
    return " MIG " in device_name


def device_called(name: str, environment: Mapping[str, str]) -> torch.device:
    """The device that --device of a command names: cpu, cuda, or auto, a GPU if there is one.

    Args:
        name: cpu, cuda or auto.
        environment: As for `find_gpu`.

    Raises:
        UserError: it is not there, or cannot be used.
    """
    if name == "cpu":
        return torch.device("cpu")
    gpu = find_gpu(environment)
    if gpu.usable:
        memory_taken(0)
        return torch.device("cuda")
    if name == "cuda":
        raise UserError(f"--device cuda: {gpu.problem or 'this machine has no CUDA GPU that PyTorch can use'}")
    if gpu.problem:
        log.warning("Computing on the CPU: %s", gpu.problem)
    return torch.device("cpu")


def decide_hardware(config: Config, environment: Mapping[str, str] | None = None) -> Hardware:
    """Settles the trainer's settings for this machine, and warns of what makes it slower than it could be.

    Args:
        config: The run.
        environment: The environment variables of the process, which say what CUDA shows and which process of a job
            this is; None: nothing is hidden, and it is the only one.

    Raises:
        UserError: the machine has not what the settings ask for.
    """
    trainer, environment = config.trainer, environment or {}
    warn = log.warning if _is_first_process(environment) else log.debug
    accelerator = _accelerator(config, environment, warn)
    name = torch.cuda.get_device_name() if accelerator == "cuda" else f"CPU ({torch.get_num_threads()} cores in use)"
    devices = _device_count(config, accelerator, name)
    world_size = devices * trainer.num_nodes
    if config.windows_per_step % world_size:
        raise UserError(
            f"a step has {config.windows_per_step} windows (batch_tokens / sequence_length); they cannot be shared "
            f"evenly among {world_size} devices: set trainer.devices to a number that divides them"
        )
    has_bf16 = accelerator == "cuda" and torch.cuda.get_device_capability()[0] >= 8
    # On a CPU without matrix units for it, bf16 is many times slower than fp32.
    precision = ("bf16" if has_bf16 else "fp32") if trainer.precision == "auto" else trainer.precision
    if precision == "bf16" and accelerator == "cuda" and not has_bf16:
        raise UserError(f"{name} has no bf16 (compute capability 8): set trainer.precision=fp32")
    if trainer.precision == "auto" and accelerator == "cuda" and not has_bf16:
        warn(
            "%s has no bf16 (compute capability 8): training in fp32; fp16 is not offered. By the data sheets, fp32 "
            "runs at a twentieth (V100, 15.7 TFLOP/s) to a fortieth (T4, 8.1) of an A100's bf16 rate (312).",
            name,
        )
    compiled = accelerator == "cuda" if trainer.compile == "auto" else bool(trainer.compile)
    residual_precision = trainer.residual_precision
    if residual_precision == "auto":
        residual_precision = "bf16" if precision == "bf16" and accelerator == "cuda" else "fp32"
    if residual_precision == "bf16" and precision == "fp32":
        raise UserError(
            "trainer.residual_precision is bf16 and training here is in fp32: leave it out, or trainer.precision=bf16"
        )
    taken = 0
    if accelerator == "cuda":
        device = min(_local_rank(environment), devices - 1)
        found = memory_taken(device)
        if world_size == 1:  # else all processes must choose the same micro-batch, and each sees only its own GPU
            taken = found
        if found:
            warn(
                "Other processes have taken %.1f of the %.1f GB of GPU %d (%s): %s.",
                found / 1e9, torch.cuda.get_device_properties(device).total_memory / 1e9, device, name,
                "the micro-batch is chosen for the rest"
                if taken and trainer.micro_batch_windows == "auto"
                else "training may run out of memory",
            )  # fmt: skip
    memory = torch.cuda.get_device_properties(0).total_memory - taken if accelerator == "cuda" else None
    step = StepMemory(config, precision, residual_precision, compiled, world_size)
    checkpointing, windows = _memory_settings(config, step, memory)
    return Hardware(
        accelerator=accelerator,
        name=name,
        devices=devices,
        world_size=world_size,
        precision=precision,
        compile=compiled,
        document_attention=_document_attention(config, accelerator, precision),
        residual_precision=residual_precision,
        micro_batch_windows=windows,
        activation_checkpointing=checkpointing,
        num_workers=(2 if accelerator == "cuda" else 0) if trainer.num_workers is None else trainer.num_workers,
        peak_flops=peak_flops(name) if accelerator == "cuda" else None,
    )


def _document_attention(config: Config, accelerator: str, precision: str) -> str:
    """One of `attention.DOCUMENT_ATTENTION` or flash3, flash4. Raises UserError for what device or model rule out."""
    setting = config.trainer.document_attention
    head_dim = config.model.hidden_size // config.model.num_attention_heads
    capability = torch.cuda.get_device_capability() if accelerator == "cuda" else (0, 0)
    fastest = document_attention(accelerator, capability, precision == "bf16", head_dim)
    if setting == "auto":
        return fastest
    if setting.startswith("flash") and fastest != "flash":
        raise UserError(
            f"trainer.document_attention={setting} needs a CUDA GPU of compute capability 8.0, bf16 and heads of a "
            f"multiple of 8, at most 256: here {accelerator} in {precision} with heads of {head_dim}"
        )
    if setting == "flex" and fastest == "dense":
        raise UserError(
            f"trainer.document_attention=flex needs a CUDA GPU and heads of at least {SMALLEST_FLEX_HEAD}: here "
            f"{accelerator} with heads of {head_dim}"
        )
    return setting


def _accelerator(config: Config, environment: Mapping[str, str], warn: Callable[..., None]) -> str:
    """cuda or cpu, as the setting wants it and the machine has it. Raises UserError if it has not."""
    wanted = config.trainer.accelerator
    if wanted == "cpu":
        return "cpu"
    gpu = find_gpu(environment)
    if gpu.usable:
        return "cuda"
    if wanted == "cuda":
        asked = f"{config.name} is set to train on a CUDA GPU (trainer.accelerator=cuda), and "
        if gpu.problem:
            raise UserError(f"{asked}PyTorch cannot use one: {gpu.problem}")
        raise UserError(
            f"{asked}this machine has none that PyTorch can use.\n"
            "To try the same pipeline small, on the CPU and the embedded corpus:\n"
            "  python -m cucafera.run +experiment=pretrain name=pretrain-small trainer=cpu model=tiny data=embedded "
            "budget_tokens=400_000 batch_tokens=4096 schedule.warmup_steps=10 callbacks=default"
        )
    if gpu.problem:
        warn("Training on the CPU (trainer.accelerator=auto): %s", gpu.problem)
    return "cpu"


def _is_first_process(environment: Mapping[str, str]) -> bool:
    """Whether this is the process of a job that speaks for all."""
    rank = next((environment[name] for name in RANK_VARIABLES if name in environment), "0")
    return rank == "0" and environment.get("NODE_RANK", "0") == "0"


def _local_rank(environment: Mapping[str, str]) -> int:
    """The number of this process's GPU on its machine."""
    return int(environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", "0")))


def _device_count(config: Config, accelerator: str, name: str) -> int:
    wanted = config.trainer.devices
    there = torch.cuda.device_count() if accelerator == "cuda" else (os.cpu_count() or 1)
    count = (there if accelerator == "cuda" else 1) if wanted == "auto" else int(wanted)
    if accelerator == "cuda" and count > 1 and is_mig_slice(name):
        raise UserError(
            f"trainer.devices is {wanted}; {name} is a slice of a card (MIG), CUDA shows a process only one, and NCCL "
            "cannot use several of one card: set trainer.devices=1"
        )
    if count > there:
        raise UserError(f"trainer.devices is {wanted}; this machine has {there} ({accelerator})")
    return count


def _memory_settings(config: Config, step: "StepMemory", memory_bytes: float | None) -> tuple[bool, int]:
    """Activation checkpointing, and the windows of one forward pass: at most what setting or memory allows.

    The windows are the largest divisor of a device's, unless that is less than half of what is allowed; then the last
    forward pass of a step is smaller.

    Args:
        config: The run.
        step: What a step takes.
        memory_bytes: What a GPU has for it; None on a CPU.
    """
    setting, checkpointing = config.trainer.micro_batch_windows, config.trainer.activation_checkpointing is True
    tokens = MICRO_BATCH_TOKENS_CPU
    if memory_bytes is not None:
        tokens = step.tokens_in(memory_bytes, checkpointing)
        needed = config.sequence_length * (1 if setting == "auto" else int(setting))
        if tokens < needed and config.trainer.activation_checkpointing == "auto":
            checkpointing, tokens = True, step.tokens_in(memory_bytes, True)
    most = max(1, tokens // config.sequence_length) if setting == "auto" else int(setting)
    windows_per_device = config.windows_per_step // step.world_size
    most = min(most, windows_per_device)
    divisor = max(n for n in range(1, most + 1) if windows_per_device % n == 0)
    return checkpointing, divisor if 2 * divisor > most else most


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """The GPU memory that a step takes at its peak, computed.

    `scripts/memory.py` adds up what PyTorch allocates without the compiler, and what the compiled model keeps. Both
    come to the same within 7%; with checkpointing this is up to 40% more.

    Attributes:
        config: The run.
        precision: fp32 or bf16.
        residual_precision: Of the residual stream.
        compiled: Whether the model is compiled: it keeps less for the backward pass.
        world_size: Devices of the job.
    """

    config: Config
    precision: str
    residual_precision: str = "fp32"
    compiled: bool = False
    world_size: int = 1

    @property
    def always(self) -> int:
        """Bytes that are needed whatever the number of tokens, if they fill a chunk of the loss.

        Weights (4 bytes per parameter), gradients and both AdamW moments (12, of those that are trained), the weights
        once more in bf16, the logits of a chunk of the loss, and the gradient of the head before it is added to the
        others. Under fsdp the devices share weights and moments, and of the weights in bf16 there is one layer at a
        time; but while the gradients of several micro-batches are added up, each device holds its own.
        """
        model = self.config.model
        half, shared = self.precision == "bf16", self.config.trainer.strategy == "fsdp" and self.world_size > 1
        parameters, head = parameter_count(model), model.vocab_size * model.hidden_size
        adapters = adapter_parameter_count(model, self.config.adapter)
        trained = adapters or parameters
        kept_by_all = 4 * (parameters + adapters) + 8 * trained
        always = kept_by_all // (self.world_size if shared else 1) + 4 * trained + (4 * head if shared else 0)
        always += LOGITS_BYTES["cuda"] + (0 if adapters else 4 * head)
        if half:
            always += 2 * (head if shared else parameters)
        return always

    def per_token(self, checkpointing: bool) -> int:
        """Bytes for each token of a forward pass: what the layers keep for the backward pass.

        With activation checkpointing that is the input of each, and one of them whole.
        """
        model = self.config.model
        residual_bytes = 2 if self.residual_precision == "bf16" else 4
        layers_kept = 1 if checkpointing else model.num_hidden_layers
        kept = ACTIVATION_BYTES[self.precision, self.compiled]
        if self.compiled:  # else the norms keep it in fp32
            kept -= RESIDUAL_PLACES * (4 - residual_bytes)
        inputs = residual_bytes * model.num_hidden_layers * model.hidden_size if checkpointing else 0
        return kept * layers_kept * model.hidden_size + inputs

    def at(self, tokens: int, checkpointing: bool) -> int:
        """Bytes with so many tokens of a forward pass."""
        logits = tokens * self.config.model.vocab_size * (2 if self.precision == "bf16" else 4)
        unfilled = max(0, LOGITS_BYTES["cuda"] - logits)
        return self.always - unfilled + tokens * self.per_token(checkpointing)

    def tokens_in(self, memory_bytes: float, checkpointing: bool) -> int:
        """Tokens of one forward pass that a GPU of so much memory has room for."""
        return int(max(0.0, USABLE_MEMORY * memory_bytes - self.always) / self.per_token(checkpointing))


def free_memory_bytes() -> int:
    """Main memory that this process may still take: what the system has, or the limit of a container or job leaves.

    Linux tells; elsewhere nothing is known to be free.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return max(0, min([free, *_left_in_groups(Path("/proc/self/cgroup"), MEMORY_GROUPS)]))


def _left_in_groups(memberships: Path, kinds: dict[str, tuple[str, str, str, str]]) -> Iterator[int]:
    """Bytes that each limit leaves, of the control group of this process and of those around it."""
    with contextlib.suppress(OSError):
        for line in memberships.read_text(encoding="utf-8").splitlines():
            _, controllers, inside = line.split(":", 2)
            for name in set(controllers.split(",")) & set(kinds):
                root, limit_file, used_file, cached_line = kinds[name]
                group = Path(root) / inside.strip("/")
                for folder in (group, *group.parents):
                    if folder.is_relative_to(root):
                        yield from _left_in_group(folder, limit_file, used_file, cached_line)


def _left_in_group(folder: Path, limit_file: str, used_file: str, cached_line: str) -> Iterator[int]:
    with contextlib.suppress(OSError):  # a container may not see the groups around it
        limit = (folder / limit_file).read_text(encoding="utf-8").strip()
        used = int((folder / used_file).read_text(encoding="utf-8"))
        parts = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
        if limit.isdecimal():  # else it is "max"
            yield int(limit) - used + sum(int(line.split()[1]) for line in parts if line.startswith(cached_line))
