"""The memory that a training step takes at its peak, computed without a GPU.

    python scripts/memory.py                          cucafera and large, with and without activation checkpointing
    python scripts/memory.py --model small --windows 1 --windows 8

A step of the model is taken with fake tensors: they have shapes and no numbers, so that nothing is computed, and what
PyTorch would allocate is added up as it comes and goes. Forward and backward pass twice, as with accumulation, then the
optimizer, in bf16 autocast (or --precision fp32), without the compiler, which keeps less. Not in it: a GPU's context,
which takes half a GB, and what is lost between the pieces.

On a machine with a GPU the same step is taken in earnest too, and the most that it allocated stands beside.
"""

import argparse
import itertools
import math
import weakref

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cucafera.composition import composed_config
from cucafera.config import Config
from cucafera.model import loss
from cucafera.model.flops import parameter_count
from cucafera.model.transformer import Decoder
from cucafera.training.hardware import memory_of_step
from cucafera.training.optimizers import build_optimizer


class AllocatedBytes(TorchDispatchMode):
    """Bytes of the tensors that are alive.

    Attributes:
        now: At this moment.
        peak: Most since the beginning, or since it was set to `now`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, operation, types, arguments=(), settings=None):
        result = operation(*arguments, **(settings or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._counted:
            self._counted.add(storage._cdata)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _forget(self, storage: int, size: int) -> None:
        self._counted.discard(storage)
        self.now -= size


def steps(config: Config, windows: int, precision: str, checkpointing: bool, device: str) -> None:
    """Two optimizer steps of two micro-batches."""
    with torch.device(device):
        model = Decoder(config.model, checkpointing)
        ids = torch.zeros(windows, config.sequence_length, dtype=torch.int64)
    optimizer = build_optimizer(model, config.optimizer)
    for _ in range(2):
        for _ in range(2):
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                nats = model(ids, ids)
            nats.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()


def computed_peak(config: Config, windows: int, precision: str, checkpointing: bool) -> int:
    """Most bytes that a step on a GPU has allocated at one moment, computed.

    Args:
        config: The run.
        windows: Of a micro-batch.
        precision: bf16 or fp32.
        checkpointing: Whether activations are computed again.
    """
    before = loss.LOGITS_IN_CHUNK["cpu"]
    loss.LOGITS_IN_CHUNK["cpu"] = loss.LOGITS_IN_CHUNK["cuda"]  # only a CPU can be pretended everywhere
    try:
        with FakeTensorMode(), AllocatedBytes() as allocated:
            steps(config, windows, precision, checkpointing, "cpu")
        return allocated.peak
    finally:
        loss.LOGITS_IN_CHUNK["cpu"] = before


def measured_peak(config: Config, windows: int, precision: str, checkpointing: bool) -> int | None:
    """The same, measured on the GPU of this machine; None if it has too little."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        steps(config, windows, precision, checkpointing, "cuda")
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="a preset of conf/model; may be repeated")
    parser.add_argument("--windows", action="append", type=int, help="windows of a micro-batch; may be repeated")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    arguments = parser.parse_args()
    measure = torch.cuda.is_available()
    print(f"{'model':12}{'parameters':>15}{'windows':>9}{'checkpointing':>15}{'state':>12}{'peak':>12}{'estimate':>12}"
          + (f"{'measured':>12}" if measure else ""))  # fmt: skip
    for name, windows, checkpointing in itertools.product(
        arguments.model or ("cucafera", "large"), arguments.windows or (1, 4), (False, True)
    ):
        config = composed_config([f"model={name}"])
        always, per_token = memory_of_step(config, arguments.precision, checkpointing)
        columns = [
            16 * parameter_count(config.model),
            computed_peak(config, windows, arguments.precision, checkpointing),
            always + windows * config.sequence_length * per_token,
        ]
        if measure:
            columns.append(measured_peak(config, windows, arguments.precision, checkpointing) or math.nan)
        print(
            f"{name:12}{parameter_count(config.model):>15,}{windows:>9}{'yes' if checkpointing else 'no':>15}"
            + "".join(f"{size / 2**30:>8.2f} GiB" for size in columns),
            flush=True,
        )


if __name__ == "__main__":
    main()
