"""Time and memory of the loss, forward and backward: plain, PyTorch's chunked one, and cucafera's.

    python scripts/benchmark_loss.py
    python scripts/benchmark_loss.py --device cuda --tokens 65536

Each measurement is a separate process, because the peak of a process's memory cannot be reset, and the methods run in
turn, so that other load affects all of them. Core seconds are processor time summed over threads. They depend least on
other programs, so on the CPU they give the speed; on CUDA wall time does. Memory is the peak of the call beyond its
inputs, including both gradients. The products run in fp32 on the CPU and in bf16 on CUDA, as in training.
"""

import argparse
import contextlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cucafera.model.loss import linear_cross_entropy


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All the logits at once."""
    return F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")


def pytorch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The chunked loss of torch 2.13 and later; eager only."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"plain": plain, "cucafera": linear_cross_entropy}
if hasattr(torch.nn, "LinearCrossEntropyOptions"):
    METHODS["pytorch"] = pytorch_chunked


def seconds_of(method: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[float, float]:
    """Return wall seconds and core seconds of one forward and backward pass."""
    started, core_started = time.perf_counter(), time.process_time()
    cuda = hidden.device.type == "cuda"
    with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
        loss = METHODS[method](hidden, weight, targets)
    loss.backward()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - core_started


def peak_bytes(device: str) -> int:
    """Return the peak memory of this process so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def inputs(tokens: int, vocabulary: int, hidden: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, weight and targets, with every eighth target ignored."""
    states = torch.randn(tokens, hidden, device=device, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, device=device).mul_(0.02).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)
    targets[::8] = -100
    return states, weight, targets


def measure(method: str, arguments: argparse.Namespace) -> tuple[float, float, float]:
    """Return seconds, core seconds and bytes of one forward and backward pass in this process."""
    torch.manual_seed(0)
    seconds_of(method, *inputs(256, 256, arguments.hidden, arguments.device))  # starts threads and kernels
    measured = inputs(arguments.tokens, arguments.vocabulary, arguments.hidden, arguments.device)
    before = peak_bytes(arguments.device)
    seconds, core_seconds = seconds_of(method, *measured)
    return seconds, core_seconds, peak_bytes(arguments.device) - before


def main() -> None:
    """Measure every method in turn, and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=65_536)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each method (default: 3)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--method", choices=sorted(METHODS), help="measure only this one, once, in this process")
    arguments = parser.parse_args()

    if arguments.method:
        print(*measure(arguments.method, arguments))
        return
    results: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for _ in range(arguments.repeat):
        for method, measurements in results.items():
            command = [sys.executable, *sys.argv, "--method", method]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            measurements.append([float(number) for number in output.split()])
    print_table(results, arguments.device)


def print_table(results: dict[str, list[list[float]]], device: str) -> None:
    """Print one row per method: medians, and ratios to the plain loss."""
    medians = {
        method: [statistics.median(column) for column in zip(*measurements, strict=True)]
        for method, measurements in results.items()
    }
    compared = 0 if device == "cuda" else 1
    print(f"{'method':<10}{'seconds':>10}{'core s':>10}{'speed':>10}{'GB':>10}{'memory':>10}")
    for method, row in medians.items():
        seconds, core_seconds, peak = row
        speed = medians["plain"][compared] / row[compared]
        memory = peak / medians["plain"][2]
        print(f"{method:<10}{seconds:>10.2f}{core_seconds:>10.2f}{speed:>9.2f}x{peak / 1e9:>10.2f}{memory:>9.2f}x")


if __name__ == "__main__":
    main()
