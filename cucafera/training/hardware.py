"""What the trainer presets mean on the machine at hand."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from cucafera.config import Config, UserError
from cucafera.model.flops import parameter_count, peak_flops

MEMORY_GROUPS = {
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file "),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
}
"""By the name of the controller, none in version 2 of Linux's control groups: where they lie, the files with limit and
use, and what begins the line of memory.stat with the part of the use that the system gives up when asked."""
MICRO_BATCH_TOKENS_CPU = 4096
"""More gain nothing on a CPU."""


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
        micro_batch_windows: Windows of one forward pass; it divides the windows of a device's step.
        num_workers: Processes that read windows.
        peak_flops: Dense bf16 peak of one device in FLOP/s; None where it is not known.
    """

    accelerator: str
    name: str
    devices: int
    world_size: int
    precision: str
    compile: bool
    micro_batch_windows: int
    num_workers: int
    peak_flops: float | None


def decide_hardware(config: Config) -> Hardware:
    """Settles the trainer's settings for this machine. Raises UserError for what it does not have."""
    trainer = config.trainer
    cuda = torch.cuda.is_available()
    if trainer.accelerator == "cuda" and not cuda:
        raise UserError(
            f"{config.name} is set to train on a CUDA GPU (trainer.accelerator=cuda), and this machine has none that "
            "PyTorch can use.\n"
            "To try the same pipeline small, on the CPU and the embedded corpus:\n"
            "  python -m cucafera.run +experiment=pretrain name=pretrain-small trainer=cpu model=tiny data=embedded "
            "budget_tokens=400_000 batch_tokens=4096 schedule.warmup_steps=10 callbacks=default"
        )
    accelerator = "cuda" if cuda and trainer.accelerator != "cpu" else "cpu"
    devices = _device_count(config, accelerator)
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
        raise UserError(
            f"{torch.cuda.get_device_name()} has no bf16 (compute capability 8): set trainer.precision=fp32"
        )
    return Hardware(
        accelerator=accelerator,
        name=torch.cuda.get_device_name() if accelerator == "cuda" else f"CPU ({torch.get_num_threads()} cores in use)",
        devices=devices,
        world_size=world_size,
        precision=precision,
        compile=accelerator == "cuda" if trainer.compile == "auto" else bool(trainer.compile),
        micro_batch_windows=_micro_batch_windows(config, accelerator, config.windows_per_step // world_size),
        num_workers=(2 if accelerator == "cuda" else 0) if trainer.num_workers is None else trainer.num_workers,
        peak_flops=peak_flops(torch.cuda.get_device_name()) if accelerator == "cuda" else None,
    )


def _device_count(config: Config, accelerator: str) -> int:
    wanted = config.trainer.devices
    there = torch.cuda.device_count() if accelerator == "cuda" else (os.cpu_count() or 1)
    if wanted == "auto":
        return there if accelerator == "cuda" else 1
    if int(wanted) > there:
        raise UserError(f"trainer.devices is {wanted}; this machine has {there} ({accelerator})")
    return int(wanted)


def _micro_batch_windows(config: Config, accelerator: str, windows_per_device: int) -> int:
    """Windows of one forward pass, at most what the setting or the device's memory allows.

    The largest divisor of a device's windows, unless that is less than half of what is allowed; then the last forward
    pass of a step is smaller.
    """
    most = config.trainer.micro_batch_windows
    if most is None:
        tokens = MICRO_BATCH_TOKENS_CPU
        if accelerator == "cuda":
            memory = torch.cuda.get_device_properties(0).total_memory
            tokens = tokens_in_memory(config, memory, config.windows_per_step // windows_per_device)
        most = max(1, tokens // config.sequence_length)
    most = min(most, windows_per_device)
    divisor = max(n for n in range(1, most + 1) if windows_per_device % n == 0)
    return divisor if 2 * divisor > most else most


def tokens_in_memory(config: Config, memory_bytes: float, world_size: int) -> int:
    """Tokens whose activations fit a GPU beside the weights, with a fifth of its memory left free.

    Weights, gradients and both AdamW moments take 16 bytes a parameter. Under fsdp the devices share them; but while
    the gradients of several micro-batches are added up, each device holds its own. A layer keeps 34 bytes a token and
    unit of width for its backward pass in 16-bit precision (Korthikanti et al., 2022, equation 1, without the attention
    matrix, which flash and flex attention do not keep).
    """
    bytes_each = 12 / world_size + 4 if config.trainer.strategy == "fsdp" else 16
    state = bytes_each * parameter_count(config.model)
    per_token = 34 * config.model.num_hidden_layers * config.model.hidden_size
    return int(max(0.0, 0.8 * memory_bytes - state) / per_token)


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
