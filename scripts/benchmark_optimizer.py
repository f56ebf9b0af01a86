"""Measure the cost of each optimizer: arithmetic, operator calls, memory and time per step.

    python scripts/benchmark_optimizer.py

The arithmetic and the calls are counted on tensors without data, for the 245M model and its batch, and compared with
torch.optim.Muon, which orthogonalizes one matrix at a time. A call of an operator is one kernel or a few on a GPU. The
times are those of `optimizer.step()` and of forward and backward pass of the quickstart's model on this machine, in
turn.
"""

import argparse
import statistics
import time
from collections import Counter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cucafera.config.command_line import composed_config
from cucafera.config.registry import OPTIMIZERS
from cucafera.config.schema import Config
from cucafera.model.flops import training_flops_per_token
from cucafera.model.transformer import Decoder
from cucafera.optimizers import build_optimizer
from cucafera.quantities import number_of

WARMUP = "schedule.warmup_steps=0"
VIEWS = (
    "prim.",
    "profiler.",
    "_unsafe_view",
    "view",
    "t.",
    "transpose",
    "unbind",
    "detach",
    "expand",
    "slice",
    "select",
    "alias",
)
"""Operators that launch nothing."""


class Calls(TorchDispatchMode):
    """Count calls of operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        name = str(operation).removeprefix("aten.")
        if not name.startswith(VIEWS):
            self.by_operator[name] += 1
        return operation(*arguments, **(settings or {}))


def counted_step(config: Config, by_pytorch: bool = False) -> tuple[int, Counter[str]]:
    """Return the floating point operations and the operator calls of one optimizer step, the second.

    Args:
        config: The run.
        by_pytorch: Train the matrices of the blocks, and nothing else, with torch.optim.Muon.
    """
    with FakeTensorMode():
        model = Decoder(config.model)
        if by_pytorch:
            matrices = [parameter for name, parameter in model.named_parameters() if "proj" in name]
            optimizer: torch.optim.Optimizer = torch.optim.Muon(matrices)
        else:
            optimizer = build_optimizer(model, config.optimizer)
            optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # makes the state
        calls, flops = Calls(), FlopCounterMode(display=False)
        with flops, calls:
            optimizer.step()
    return flops.get_total_flops(), calls.by_operator


def print_counts(model: str, batch_tokens: int) -> None:
    """Print arithmetic, calls and state of each optimizer."""
    print(f"{model}, {number_of(batch_tokens, 'token')} per step, counted\n")
    print(f"{'':24}{'FLOP':>10}{'of a step':>11}{'calls':>8}{'state':>10}")
    for name in [*OPTIMIZERS.names(), "torch.optim.Muon"]:
        by_pytorch = name not in OPTIMIZERS.names()
        chosen = "muon" if by_pytorch else name
        config = composed_config([f"model={model}", f"batch_tokens={batch_tokens}", f"optimizer={chosen}", WARMUP])
        flops, calls = counted_step(config, by_pytorch)
        share = flops / (training_flops_per_token(config.model, config.sequence_length) * batch_tokens)
        state = "" if by_pytorch else f"{OPTIMIZERS.get(name).state_bytes(config) / 1e9:.2f} GB"
        print(f"{name:24}{flops:>10.2e}{share:>11.2%}{calls.total():>8,}{state:>10}")
    print("\ntorch.optim.Muon trains the matrices of the blocks only.")


def print_times(model: str, steps: int, rounds: int) -> None:
    """Print the median times of a step of each optimizer, and of forward and backward pass."""
    config = composed_config([f"model={model}", WARMUP])
    shape = (config.windows_per_step, config.sequence_length)
    ids = torch.randint(2, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    trained = {}
    for name in OPTIMIZERS.names():
        torch.manual_seed(0)
        decoder = Decoder(config.model)
        trained[name] = decoder, build_optimizer(decoder, composed_config([f"optimizer={name}"]).optimizer)
    times: dict[str, list[float]] = {"forward and backward": [], **{name: [] for name in trained}}
    for _ in range(rounds):
        for name, (decoder, optimizer) in trained.items():
            for step in range(steps + 1):
                started = time.perf_counter()
                (decoder(ids[:, :-1], ids[:, 1:]) / ids.numel()).backward()
                between = time.perf_counter()
                optimizer.step()
                ended = time.perf_counter()
                optimizer.zero_grad()
                if step:  # the first of a round warms caches
                    times["forward and backward"].append(between - started)
                    times[name].append(ended - between)
    base = statistics.median(times["forward and backward"])
    cores = number_of(torch.get_num_threads(), "core")
    print(f"\n{model}, {number_of(ids.numel(), 'token')} per step, measured on {cores}: medians\n")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:24}{1000 * median:>9.2f} ms{median / base:>9.1%}")


def main() -> None:
    """Parse the command line, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cucafera", help="a preset of conf/model, to count")
    parser.add_argument("--batch-tokens", type=int, default=524_288)
    parser.add_argument("--measure", default="tiny", help="a preset of conf/model, to measure")
    parser.add_argument("--steps", type=int, default=10, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print_counts(arguments.model, arguments.batch_tokens)
    print_times(arguments.measure, arguments.steps, arguments.rounds)


if __name__ == "__main__":
    main()
