"""The peak memory of a training step, computed without a GPU.

    python scripts/memory.py                          cucafera and large, with and without activation checkpointing
    python scripts/memory.py --model small --windows 1 --windows 8

A step runs with fake tensors, which have shapes but no values: nothing is computed, and the allocations of PyTorch are
added up. It has two forward and backward passes, as with gradient accumulation, and the optimizer update, in bf16
autocast (or --precision fp32), in eager mode. The compiled model keeps less per layer for the backward pass: that is
counted from the partitioner of the compiler, and printed on a separate line. Not included are the CUDA context, half a
GB, and fragmentation.

On a machine with a GPU the same step runs on it too, and the measured peak is printed as well.
"""

import argparse
import contextlib
import dataclasses
import itertools
import math
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cucafera.config.command_line import composed_config
from cucafera.config.registry import OPTIMIZERS
from cucafera.config.schema import Config
from cucafera.model import loss
from cucafera.model.flops import layer_shapes, parameter_count
from cucafera.model.transformer import Decoder
from cucafera.optimizers import build_optimizer
from cucafera.training.memory import StepMemory


class AllocatedBytes(TorchDispatchMode):
    """Count the bytes of live tensors.

    Attributes:
        now: Current bytes.
        peak: Maximum of `now` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, operation, types, arguments=(), settings=None):
        if operation is torch.ops.cucafera.linear_cross_entropy.default:  # its internal allocations are not dispatched
            hidden, weight, _, _, chunk_tokens, _ = arguments
            self.peak = max(self.peak, self.now + loss.workspace_bytes(hidden, weight, chunk_tokens, "cuda"))
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
    """Run two optimizer steps of two micro-batches each."""
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
    """Compute the peak of allocated bytes in a step on a GPU.

    Args:
        config: The run.
        windows: Windows per micro-batch.
        precision: bf16 or fp32.
        checkpointing: True for activation checkpointing.
    """
    with as_if_for_cuda(), FakeTensorMode(), AllocatedBytes() as allocated:
        steps(config, windows, precision, checkpointing, "cpu")
    return allocated.peak


@contextlib.contextmanager
def as_if_for_cuda() -> Iterator[None]:
    """Use CUDA's chunk size of the loss within the context: the fake tensors are on the CPU, for any machine."""
    chunk_tokens = loss._chunk_tokens
    loss._chunk_tokens = lambda device_type, dtype, vocabulary: chunk_tokens("cuda", dtype, vocabulary)
    try:
        yield
    finally:
        loss._chunk_tokens = chunk_tokens


def kept_by_compiled_layer(config: Config, windows: int, precision: str, residual_precision: str) -> float:
    """Count the bytes that each layer of the compiled model keeps for the backward pass, per token and unit of width.

    These are the tensors that the partitioner of torch.compile passes from the forward to the backward graph, with
    views of one tensor counted once. The difference between models of three and of two layers is one layer. Copies of
    its weights are subtracted: all weights in bf16, or the concatenated ones in fp32.
    """
    sizes = []
    for layers in (2, 3):
        shape = dataclasses.replace(config.model, num_hidden_layers=layers)
        kept: list[int] = []
        sizes.append(kept)

        def count(graph: torch.fx.GraphModule, inputs: object, kept: list[int] = kept) -> torch.fx.GraphModule:
            outputs = graph.graph.output_node().args[0]
            saved = [node.meta["val"] for node in outputs if node is not None and node.op != "placeholder"]
            storages = [tensor.untyped_storage() for tensor in saved if isinstance(tensor, Tensor)]
            kept.append(sum({storage._cdata: storage.nbytes() for storage in storages}.values()))
            return graph

        backend = aot_autograd(
            fw_compiler=count,
            bw_compiler=lambda graph, inputs: graph,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        torch.compiler.reset()
        with FakeTensorMode(allow_non_fake_inputs=True):
            residual_dtype = torch.bfloat16 if residual_precision == "bf16" else None
            model = torch.compile(Decoder(shape, residual_dtype=residual_dtype), dynamic=False, backend=backend)
            ids = torch.zeros(windows, config.sequence_length, dtype=torch.int32)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                model(ids, ids)
    copied = {name: outputs * inputs for name, (outputs, inputs) in layer_shapes(config.model).items()}
    if precision == "fp32":
        del copied["o_proj"], copied["down_proj"]
    weights = (2 if precision == "bf16" else 4) * sum(copied.values())
    per_layer = sizes[1][0] - sizes[0][0] - weights
    return per_layer / (windows * config.sequence_length * config.model.hidden_size)


def measured_peak(config: Config, windows: int, precision: str, checkpointing: bool) -> int | None:
    """Measure the same on the GPU of this machine; None if it runs out of memory."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        steps(config, windows, precision, checkpointing, "cuda")
    except torch.OutOfMemoryError:
        return None
    return torch.cuda.max_memory_allocated()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="a preset of conf/model; may be repeated")
    parser.add_argument("--windows", action="append", type=int, help="windows per micro-batch; may be repeated")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    arguments = parser.parse_args()
    measure = torch.cuda.is_available()
    optimizer = OPTIMIZERS.get("adamw")
    print(f"{'model':12}{'parameters':>15}{'windows':>9}{'checkpointing':>15}{'state':>12}{'peak':>12}{'estimate':>12}"
          + (f"{'measured':>12}" if measure else ""))  # fmt: skip
    for name, windows, checkpointing in itertools.product(
        arguments.model or ("cucafera", "large"), arguments.windows or (1, 4), (False, True)
    ):
        config = composed_config([f"model={name}"])
        step = StepMemory(config, arguments.precision, optimizer.state_bytes(config))
        columns = [
            16 * parameter_count(config.model),
            computed_peak(config, windows, arguments.precision, checkpointing),
            step.peak_bytes(windows * config.sequence_length, checkpointing),
        ]
        if measure:
            columns.append(measured_peak(config, windows, arguments.precision, checkpointing) or math.nan)
        print(
            f"{name:12}{parameter_count(config.model):>15,}{windows:>9}{'yes' if checkpointing else 'no':>15}"
            + "".join(f"{size / 2**30:>8.2f} GiB" for size in columns),
            flush=True,
        )
    config = composed_config([f"model={(arguments.model or ['cucafera'])[0]}"])
    for residual_precision in ("fp32", "bf16") if arguments.precision == "bf16" else ("fp32",):
        kept = kept_by_compiled_layer(config, 1, arguments.precision, residual_precision)
        step = StepMemory(config, arguments.precision, optimizer.state_bytes(config), residual_precision, compiled=True)
        estimate = step.bytes_per_token(False) / config.model.num_hidden_layers / config.model.hidden_size
        print(f"A compiled layer keeps {kept:.1f} bytes per token and unit of width, with the residual stream in "
              f"{residual_precision}; estimate {estimate:.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
