"""Memory formulas: the GPU memory that a training step needs, and the main memory that this process may still use."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from cucafera.config.schema import Config
from cucafera.model.flops import adapter_parameter_count, parameter_count
from cucafera.model.loss import LOGITS_BYTES

ACTIVATION_BYTES = {("bf16", False): 54, ("fp32", False): 80, ("bf16", True): 37, ("fp32", True): 66}
"""Bytes that a layer keeps for its backward pass per token and unit of width, by (precision, compiled), with the
residual stream in fp32. The compiled ones are counted from the partitioner of torch.compile by `scripts/memory.py`."""
SAVED_RESIDUALS = 2
"""Copies of the residual stream that a layer keeps: the inputs of its two norms."""
USABLE_MEMORY = 0.88
"""Share of a GPU's memory that a step may use; the rest is for the CUDA context and for fragmentation."""


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Formula for the peak of GPU memory in a training step.

    `scripts/memory.py` adds up what PyTorch allocates without the compiler, and counts what the compiled model keeps.
    The formula agrees with both within 7%; with activation checkpointing it is up to 40% higher, because the loss and
    the layer that is recomputed never need their memory at the same time.

    Attributes:
        config: The run.
        precision: fp32 or bf16.
        optimizer_state_bytes: Bytes of the optimizer's state for all trained parameters.
        residual_precision: Of the residual stream: fp32 or bf16.
        compiled: True if the model is compiled, which keeps less for the backward pass.
        world_size: Devices of the job.
    """

    config: Config
    precision: str
    optimizer_state_bytes: int
    residual_precision: str = "fp32"
    compiled: bool = False
    world_size: int = 1

    @property
    def fixed_bytes(self) -> int:
        """Bytes that do not depend on the number of tokens, if they fill one chunk of the loss."""
        model = self.config.model
        sharded = self.config.trainer.strategy == "fsdp" and self.world_size > 1
        parameters, head = parameter_count(model), model.vocab_size * model.hidden_size
        adapters = adapter_parameter_count(model, self.config.adapter)
        trained = adapters or parameters  # next to adapters, the weights are frozen

        state = 4 * (parameters + adapters) + self.optimizer_state_bytes  # the weights are fp32
        if sharded:
            # FSDP2 shards weights and optimizer state; the head (tied embedding) is gathered in full for the loss.
            state = state // self.world_size + 4 * head
        # During gradient accumulation FSDP2 keeps unsharded gradients, so they are not divided by the world size.
        gradients = 4 * trained
        # The loss holds one chunk of logits, and accumulates the head's gradient before autograd adds it to the rest.
        loss = LOGITS_BYTES["cuda"] + (0 if adapters else 4 * head)
        # Autocast caches a bf16 copy of every weight; under FSDP2 only the block that is computed has one.
        autocast = 2 * (head if sharded else parameters) if self.precision == "bf16" else 0
        return state + gradients + loss + autocast

    def bytes_per_token(self, checkpointing: bool) -> int:
        """Return the bytes that the layers keep for the backward pass per token of a forward pass."""
        model = self.config.model
        residual_bytes = 2 if self.residual_precision == "bf16" else 4
        kept = ACTIVATION_BYTES[self.precision, self.compiled]
        if self.compiled:  # without the compiler, the norms keep their inputs in fp32 whatever the stream's precision
            kept -= SAVED_RESIDUALS * (4 - residual_bytes)
        if not checkpointing:
            return kept * model.num_hidden_layers * model.hidden_size
        # The input of each layer, and all activations of the one that is recomputed (Chen et al., 2016).
        return (kept + residual_bytes * model.num_hidden_layers) * model.hidden_size

    def peak_bytes(self, tokens: int, checkpointing: bool) -> int:
        """Return the peak of a step whose forward passes have this many tokens."""
        logits = tokens * self.config.model.vocab_size * (2 if self.precision == "bf16" else 4)
        unfilled = max(0, LOGITS_BYTES["cuda"] - logits)
        return self.fixed_bytes - unfilled + tokens * self.bytes_per_token(checkpointing)

    def max_tokens(self, memory_bytes: float, checkpointing: bool) -> int:
        """Return the most tokens of one forward pass that fit a GPU with this much memory."""
        free = max(0.0, USABLE_MEMORY * memory_bytes - self.fixed_bytes)
        return int(free / self.bytes_per_token(checkpointing))


class CgroupFiles(NamedTuple):
    """Names in the cgroup file system.

    Attributes:
        root: Where the hierarchy is mounted.
        limit, usage: Files with bytes.
        reclaimable: First word of the line of memory.stat with the page cache that the kernel reclaims on demand.
    """

    root: str
    limit: str
    usage: str
    reclaimable: str


CGROUP_FILES = {
    "": CgroupFiles("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": CgroupFiles(
        "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    ),
}
"""By controller: version 2 names none, version 1, which older clusters run, names memory."""


def free_memory_bytes() -> int:
    """Return the main memory that this process may still use: MemAvailable, or less if a cgroup limits it.

    /proc/meminfo shows the machine, not the limit of a container or of a SLURM job with --mem. A copy of the training
    state beyond that limit would get the run killed at each checkpoint, without a message. On systems without
    /proc/meminfo the result is 0.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return max(0, min([available, *_cgroup_headroom(Path("/proc/self/cgroup"), CGROUP_FILES)]))


def _cgroup_headroom(memberships: Path, controllers: Mapping[str, CgroupFiles]) -> Iterator[int]:
    """Yield the bytes left under each limit on this process's cgroup and its ancestors."""
    with contextlib.suppress(OSError):
        for line in memberships.read_text(encoding="utf-8").splitlines():
            _, names, path = line.split(":", 2)
            for name in set(names.split(",")) & set(controllers):
                files = controllers[name]
                group = Path(files.root) / path.strip("/")
                for folder in (group, *group.parents):
                    if folder.is_relative_to(files.root):
                        yield from _headroom_in(folder, files)


def _headroom_in(folder: Path, files: CgroupFiles) -> Iterator[int]:
    with contextlib.suppress(OSError):  # a container may not see its ancestors
        limit = (folder / files.limit).read_text(encoding="utf-8").strip()
        usage = int((folder / files.usage).read_text(encoding="utf-8"))
        statistics = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
        if limit.isdecimal():  # else it is "max"
            reclaimable = sum(int(line.split()[1]) for line in statistics if line.split()[0] == files.reclaimable)
            yield int(limit) - usage + reclaimable
