"""Resolve the trainer settings that are `auto` for the machine of this process."""

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping

import torch

from cucafera.config.errors import UserError
from cucafera.config.registry import OPTIMIZERS
from cucafera.config.schema import Config
from cucafera.device import find_gpu, is_mig_slice, memory_used_by_others
from cucafera.model.attention import MIN_FLEX_HEAD_DIM, fastest_document_attention
from cucafera.model.flops import peak_flops
from cucafera.process import RANK_VARIABLES, is_first_process
from cucafera.quantities import data_size, number_of
from cucafera.training.memory import StepMemory

log = logging.getLogger(__name__)

MICRO_BATCH_TOKENS_CPU = 4096
"""Tokens of a micro-batch on a CPU; more are not faster."""


class NoGpuError(UserError):
    """The settings require a GPU that the machine lacks."""


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The trainer settings with every `auto` resolved.

    Attributes:
        accelerator: cpu or cuda.
        name: Name of the device.
        devices: Devices per node.
        world_size: Devices of the job.
        precision: fp32 or bf16.
        compile: True if the model is compiled.
        document_attention: Kernel for attention within documents: one of `attention.DOCUMENT_ATTENTION`, or flash3 or
            flash4.
        residual_precision: Of the residual stream: fp32 or bf16.
        micro_batch_windows: Windows of one forward pass; the last one of a step may have fewer.
        activation_checkpointing: True if activations are recomputed in the backward pass.
        num_workers: Processes that read windows.
        peak_flops: Dense bf16 peak of one device in FLOP/s; None if it is not known.
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
        """Return the next settings to try after running out of memory; None if the configuration allows none.

        First the windows of a forward pass are halved, down to one; then activation checkpointing is turned on.
        """
        if self.micro_batch_windows > 1 and config.trainer.micro_batch_windows == "auto":
            return dataclasses.replace(self, micro_batch_windows=self.micro_batch_windows // 2)
        if not self.activation_checkpointing and config.trainer.activation_checkpointing == "auto":
            return dataclasses.replace(self, activation_checkpointing=True)
        return None


def decide_hardware(config: Config, environment: Mapping[str, str] | None = None) -> Hardware:
    """Resolve the trainer settings for this machine, and warn of what makes it slower than it could be.

    Args:
        config: The run.
        environment: The environment variables of the process, which give the visible GPUs and the rank of this process
            in its job; None: all GPUs are visible and it is the only process.

    Raises:
        UserError: the machine lacks what the settings require, or a rank is not a number.
    """
    trainer, environment = config.trainer, environment or {}
    for variable in RANK_VARIABLES:  # Lightning reads them where it is imported
        if not environment.get(variable, "0").isdecimal():
            raise UserError(
                f"The environment variable {variable} is {environment[variable]!r}, not a number: unset it, or "
                "start the processes with torchrun or srun"
            )
    warn = log.warning if is_first_process(environment) else log.debug
    accelerator = _accelerator(config, environment, warn)
    on_gpu = accelerator == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else f"CPU ({number_of(torch.get_num_threads(), 'core')} in use)"
    devices = _device_count(config, accelerator, name)
    world_size = devices * trainer.num_nodes
    if config.windows_per_step % world_size:
        raise UserError(
            f"a step has {number_of(config.windows_per_step, 'window')} (batch_tokens / sequence_length); "
            "they cannot be shared "
            f"evenly among {number_of(world_size, 'device')}: set trainer.devices to a number that divides them"
        )
    precision = _precision(config, accelerator, name, warn)
    residual_precision = _residual_precision(config, accelerator, precision)
    compiled = on_gpu if trainer.compile == "auto" else bool(trainer.compile)
    memory = _gpu_memory(config, environment, devices, world_size, name, warn) if on_gpu else None
    step = StepMemory(
        config,
        precision,
        OPTIMIZERS.get(config.optimizer.name).state_bytes(config),
        residual_precision,
        compiled,
        world_size,
    )
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
        num_workers=(2 if on_gpu else 0) if trainer.num_workers is None else trainer.num_workers,
        peak_flops=peak_flops(name) if on_gpu else None,
    )


def _accelerator(config: Config, environment: Mapping[str, str], warn: Callable[..., None]) -> str:
    """Return cuda or cpu. Raises UserError if the setting requires a GPU that the machine lacks."""
    setting = config.trainer.accelerator
    if setting == "cpu":
        return "cpu"
    gpu = find_gpu(environment)
    if gpu.usable:
        return "cuda"
    if setting == "cuda":
        required = f"{config.name} is set to train on a CUDA GPU (trainer.accelerator=cuda), and "
        if gpu.problem:
            raise UserError(f"{required}PyTorch cannot use one: {gpu.problem}")
        raise NoGpuError(f"{required}this machine has none that PyTorch can use")
    if gpu.problem:
        warn("Training on the CPU (trainer.accelerator=auto): %s", gpu.problem)
    return "cpu"


def _local_rank(environment: Mapping[str, str]) -> int:
    """Return the index of this process's GPU on its node."""
    return int(environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", "0")))


def _device_count(config: Config, accelerator: str, name: str) -> int:
    setting = config.trainer.devices
    available = torch.cuda.device_count() if accelerator == "cuda" else (os.cpu_count() or 1)
    count = (available if accelerator == "cuda" else 1) if setting == "auto" else int(setting)
    if accelerator == "cuda" and count > 1 and is_mig_slice(name):
        raise UserError(
            f"trainer.devices is {setting}; {name} is a slice of a card (MIG), CUDA shows a process only one, and NCCL "
            "cannot use several of one card: set trainer.devices=1"
        )
    if count > available:
        raise UserError(f"trainer.devices is {setting}; this machine has {available} ({accelerator})")
    return count


def _precision(config: Config, accelerator: str, name: str, warn: Callable[..., None]) -> str:
    """Return bf16 or fp32; on a CPU without matrix units for it, bf16 is many times slower than fp32."""
    setting = config.trainer.precision
    has_bf16 = accelerator == "cuda" and torch.cuda.get_device_capability()[0] >= 8
    if accelerator == "cuda" and not has_bf16:
        if setting == "bf16":
            raise UserError(f"{name} has no bf16 (compute capability 8): set trainer.precision=fp32")
        if setting == "auto":
            warn(
                "%s has no bf16 (compute capability 8): training in fp32; fp16 is not offered. By the data sheets, "
                "fp32 runs at a twentieth (V100, 15.7 TFLOP/s) to a fortieth (T4, 8.1) of an A100's bf16 rate (312).",
                name,
            )
    return ("bf16" if has_bf16 else "fp32") if setting == "auto" else setting


def _residual_precision(config: Config, accelerator: str, precision: str) -> str:
    setting = config.trainer.residual_precision
    if setting == "auto":
        return "bf16" if precision == "bf16" and accelerator == "cuda" else "fp32"
    if setting == "bf16" and precision == "fp32":
        raise UserError(
            "trainer.residual_precision is bf16, but training is in fp32: remove it, or set trainer.precision=bf16"
        )
    return setting


def _document_attention(config: Config, accelerator: str, precision: str) -> str:
    """Return one of `attention.DOCUMENT_ATTENTION` or flash3, flash4. Raises UserError if device or model lack it."""
    setting = config.trainer.document_attention
    head_dim = config.model.hidden_size // config.model.num_attention_heads
    capability = torch.cuda.get_device_capability() if accelerator == "cuda" else (0, 0)
    fastest = fastest_document_attention(accelerator, capability, precision == "bf16", head_dim)
    if setting == "auto":
        return fastest
    if setting.startswith("flash") and fastest != "flash":
        raise UserError(
            f"trainer.document_attention={setting} needs a CUDA GPU of compute capability 8.0, bf16 and heads of a "
            f"multiple of 8, at most 256; this run has {accelerator} in {precision} with heads of {head_dim}"
        )
    if setting == "flex" and fastest == "dense":
        raise UserError(
            f"trainer.document_attention=flex needs a CUDA GPU and heads of at least {MIN_FLEX_HEAD_DIM}; this run has "
            f"{accelerator} with heads of {head_dim}"
        )
    return setting


def _gpu_memory(
    config: Config,
    environment: Mapping[str, str],
    devices: int,
    world_size: int,
    name: str,
    warn: Callable[..., None],
) -> float:
    """Return the bytes of GPU memory that a step may be planned for, and warn if other processes use some."""
    device = min(_local_rank(environment), devices - 1)
    used = memory_used_by_others(device)
    # The processes of a job must choose the same micro-batch, and each sees only its own GPU.
    counts = world_size == 1
    if used:
        warn(
            "Other processes use %s of the %s of GPU %d (%s): %s.",
            data_size(used), data_size(torch.cuda.get_device_properties(device).total_memory), device, name,
            "the micro-batch is chosen for the rest"
            if counts and config.trainer.micro_batch_windows == "auto"
            else "training may run out of memory",
        )  # fmt: skip
    return torch.cuda.get_device_properties(0).total_memory - (used if counts else 0)


def _memory_settings(config: Config, step: StepMemory, memory_bytes: float | None) -> tuple[bool, int]:
    """Return activation checkpointing, and the windows of one forward pass that setting and memory allow.

    Args:
        config: The run.
        step: The memory formula of its step.
        memory_bytes: Of a GPU; None on a CPU.
    """
    setting, checkpointing = config.trainer.micro_batch_windows, config.trainer.activation_checkpointing is True
    tokens = MICRO_BATCH_TOKENS_CPU
    if memory_bytes is not None:
        tokens = step.max_tokens(memory_bytes, checkpointing)
        needed = config.sequence_length * (1 if setting == "auto" else int(setting))
        if tokens < needed and config.trainer.activation_checkpointing == "auto":
            checkpointing, tokens = True, step.max_tokens(memory_bytes, True)
    allowed = max(1, tokens // config.sequence_length) if setting == "auto" else int(setting)
    windows_per_device = config.windows_per_step // step.world_size
    allowed = min(allowed, windows_per_device)
    # Micro-batches of one size need one compiled graph; a divisor below half of what fits would cost more than that.
    divisor = max(n for n in range(1, allowed + 1) if windows_per_device % n == 0)
    return checkpointing, divisor if 2 * divisor > allowed else allowed
