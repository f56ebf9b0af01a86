"""What the trainer presets mean on the machine at hand."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from cucafera.config import Config, UserError
from cucafera.model.attention import SMALLEST_FLEX_HEAD, document_attention
from cucafera.model.flops import adapter_parameter_count, parameter_count, peak_flops
from cucafera.model.loss import LOGITS_IN_CHUNK

MEMORY_GROUPS = {
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file "),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
}
"""By the name of the controller, none in version 2 of Linux's control groups: where they lie, the files with limit and
use, and what begins the line of memory.stat with the part of the use that the system gives up when asked."""
MICRO_BATCH_TOKENS_CPU = 4096
"""More gain nothing on a CPU."""
ACTIVATION_BYTES = {"bf16": 54, "fp32": 80}
"""What a layer keeps for its backward pass, a token and unit of width; see `scripts/memory.py`."""
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
        document_attention: What computes attention within documents, of `attention.DOCUMENT_ATTENTION`.
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


def device_called(name: str) -> torch.device:
    """The device that --device of a door names: cpu, cuda, or auto, a GPU if there is one.

    Raises:
        UserError: it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA GPU that PyTorch can use: leave --device out")
    return torch.device(name)


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
    document_attention = _document_attention(config, accelerator, precision)
    residual_precision = trainer.residual_precision
    if residual_precision == "auto":
        residual_precision = "bf16" if precision == "bf16" and accelerator == "cuda" else "fp32"
    checkpointing, windows = _memory_settings(config, accelerator, precision, world_size)
    return Hardware(
        accelerator=accelerator,
        name=torch.cuda.get_device_name() if accelerator == "cuda" else f"CPU ({torch.get_num_threads()} cores in use)",
        devices=devices,
        world_size=world_size,
        precision=precision,
        compile=accelerator == "cuda" if trainer.compile == "auto" else bool(trainer.compile),
        document_attention=document_attention,
        residual_precision=residual_precision,
        micro_batch_windows=windows,
        activation_checkpointing=checkpointing,
        num_workers=(2 if accelerator == "cuda" else 0) if trainer.num_workers is None else trainer.num_workers,
        peak_flops=peak_flops(torch.cuda.get_device_name()) if accelerator == "cuda" else None,
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


def _device_count(config: Config, accelerator: str) -> int:
    wanted = config.trainer.devices
    there = torch.cuda.device_count() if accelerator == "cuda" else (os.cpu_count() or 1)
    if wanted == "auto":
        return there if accelerator == "cuda" else 1
    if int(wanted) > there:
        raise UserError(f"trainer.devices is {wanted}; this machine has {there} ({accelerator})")
    return int(wanted)


def _memory_settings(config: Config, accelerator: str, precision: str, world_size: int) -> tuple[bool, int]:
    """Activation checkpointing, and the windows of one forward pass: at most what setting or memory allows.

    The windows are the largest divisor of a device's, unless that is less than half of what is allowed; then the last
    forward pass of a step is smaller.
    """
    setting, checkpointing = config.trainer.micro_batch_windows, config.trainer.activation_checkpointing is True
    tokens = MICRO_BATCH_TOKENS_CPU
    if accelerator == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        tokens = tokens_in_memory(config, precision, checkpointing, memory, world_size)
        needed = config.sequence_length * (1 if setting == "auto" else int(setting))
        if tokens < needed and config.trainer.activation_checkpointing == "auto":
            checkpointing, tokens = True, tokens_in_memory(config, precision, True, memory, world_size)
    most = max(1, tokens // config.sequence_length) if setting == "auto" else int(setting)
    windows_per_device = config.windows_per_step // world_size
    most = min(most, windows_per_device)
    divisor = max(n for n in range(1, most + 1) if windows_per_device % n == 0)
    return checkpointing, divisor if 2 * divisor > most else most


def tokens_in_memory(
    config: Config, precision: str, checkpointing: bool, memory_bytes: float, world_size: int = 1
) -> int:
    """Tokens of one forward pass that a GPU has memory for."""
    fixed, per_token = memory_of_step(config, precision, checkpointing, world_size)
    return int(max(0.0, USABLE_MEMORY * memory_bytes - fixed) / per_token)


def memory_of_step(config: Config, precision: str, checkpointing: bool, world_size: int = 1) -> tuple[int, int]:
    """Bytes of GPU memory that a step takes at its peak: those that are always needed, and those for each token.

    Always: weights (4 bytes a parameter), gradients and both AdamW moments (12, of those that are trained), the weights
    once more in bf16, the logits of a chunk of the loss with their gradient, and the head with its gradient. For each
    token: what the layers keep for the backward pass; with activation checkpointing that is the input of each, and one
    of them whole. `scripts/memory.py` adds up what PyTorch allocates without the compiler, which keeps less, and comes
    to the same within 7%; with checkpointing this is up to 40% more.

    Under fsdp the devices share weights and moments, and of the weights in bf16 there is one layer at a time; but while
    the gradients of several micro-batches are added up, each device holds its own.
    """
    model = config.model
    half, shared = precision == "bf16", config.trainer.strategy == "fsdp" and world_size > 1
    parameters, head = parameter_count(model), model.vocab_size * model.hidden_size
    adapters = adapter_parameter_count(model, config.adapter)
    trained = adapters or parameters
    kept_by_all = 4 * (parameters + adapters) + 8 * trained
    always = kept_by_all // (world_size if shared else 1) + 4 * trained + (4 * head if shared else 0)
    always += (6 if half else 4) * (head + LOGITS_IN_CHUNK["cuda"])
    if half and not shared:
        always += 2 * parameters
    layers_kept = 1 if checkpointing else model.num_hidden_layers
    per_token = ACTIVATION_BYTES[precision] * layers_kept * model.hidden_size
    return always, per_token + (4 * model.num_hidden_layers * model.hidden_size if checkpointing else 0)


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
