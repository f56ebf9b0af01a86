"""The cost of fault tolerance: checkpoints, and the guards of a step.

    python scripts/benchmark_safety.py checkpoint     of the 245M model, trained for two steps of 256 tokens
    python scripts/benchmark_safety.py guards         of the quickstart's model and batch

A checkpoint costs the time for which training stops, while the state is copied, and the slowdown of steps while the
copy is written. Both are measured against steps without a checkpoint, and so is a synchronous save. The share of time
between two checkpoints is given for a chosen step time (--step-seconds, --every-steps).

The guards of a step are timed alone, and steps with and without them in turn.

Set OMP_WAIT_POLICY=PASSIVE: spinning threads slow the writing of a checkpoint, and are slowed by it.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cucafera.config.command_line import composed_config
from cucafera.config.schema import Config
from cucafera.model.flops import parameter_count
from cucafera.model.transformer import Decoder
from cucafera.optimizers import build_optimizer
from cucafera.quantities import number_of
from cucafera.runs.checkpoints import CheckpointFolder
from cucafera.training.callbacks.guards import LossMonitor
from cucafera.training.checkpoint_writer import CheckpointWriter
from cucafera.training.memory import free_memory_bytes


class Steps:
    """Training steps of one model on random tokens.

    Args:
        config: The model and optimizer.
        windows: Windows per step.
        length: Tokens per window.
    """

    def __init__(self, config: Config, windows: int, length: int) -> None:
        torch.manual_seed(0)
        self.model = Decoder(config.model)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.ids = torch.randint(config.model.vocab_size, (windows, length + 1))
        self.pending: list[torch.Tensor] = []
        self.monitor = LossMonitor(config.callbacks.guards)

    def step(self, guarded: bool = True) -> float:
        """Run one step, and return its seconds."""
        started = time.perf_counter()
        loss = self.model(self.ids[:, :-1], self.ids[:, 1:], None) / self.ids[:, 1:].numel()
        loss.backward()
        gradient_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.found_inf = self.guard(loss.detach(), gradient_norm) if guarded else None  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    def guard(self, loss: torch.Tensor, gradient_norm: torch.Tensor) -> torch.Tensor:
        """Do the work of the guards: part of it in each step, part on every tenth."""
        nonfinite = (~(torch.isfinite(loss) & torch.isfinite(gradient_norm))).float()
        self.pending.append(torch.stack([loss, gradient_norm, nonfinite]))
        if len(self.pending) == 10:
            for value, _, _ in torch.stack(self.pending).tolist():
                self.monitor.deviations(value)
            self.pending.clear()
        return nonfinite


def checkpoint(arguments: argparse.Namespace) -> None:
    """Measure saves of one model."""
    config = composed_config(["model=" + arguments.model])
    steps = Steps(config, windows=1, length=256)
    for _ in range(2):
        steps.step()
    alone = [steps.step() for _ in range(arguments.repeat)]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as directory:
        writer = CheckpointWriter(CheckpointFolder(Path(directory)), None, 2, 0, free_memory_bytes)
        stalls, writing, slowdowns = [], [], []
        for number in range(1 + arguments.repeat):
            started = time.perf_counter()
            writer.save_checkpoint(state_of(steps, number), None, None)
            stalled = time.perf_counter() - started
            thread = writer._thread
            assert thread is not None, "there is too little memory for a copy"
            during = []
            while thread.is_alive():
                during.append(steps.step())
            writer.finish()
            writing.append(time.perf_counter() - started - stalled)
            if number == 0:
                print(f"the first save, which allocates the copy, stops training for {stalled:.2f} s")
                continue
            stalls.append(stalled)
            slowdowns.append(sum(during) - len(during) * statistics.median(alone))
            print(f"save {number}: training stopped for {stalled:.2f} s, and lost {slowdowns[-1]:.2f} s", flush=True)
        waiting = []
        for number in range(100, 100 + arguments.repeat):
            started = time.perf_counter()
            CheckpointWriter(CheckpointFolder(Path(directory)), None, 2, 0, lambda: 0).save_checkpoint(
                state_of(steps, number), None, None
            )
            waiting.append(time.perf_counter() - started)
        (size,) = {found.size for found in CheckpointFolder(Path(directory)).complete()}
    stall, lost = statistics.median(stalls), statistics.median(slowdowns)
    print(
        f"{number_of(parameter_count(config.model), 'parameter')}, {size / 1e9:.2f} GB, "
        f"written in {statistics.median(writing):.1f} s"
    )
    print(f"a checkpoint costs {stall + lost:.2f} s: {stall:.2f} s stopped, {lost:.2f} s of slower steps (medians)")
    print(f"a synchronous one costs {statistics.median(waiting):.2f} s")
    between = arguments.every_steps * arguments.step_seconds
    print(
        f"every {number_of(arguments.every_steps, 'step')} of {arguments.step_seconds} s: "
        f"{(stall + lost) / between:.3%} of the time"
    )
    print(f"more than 2% if a step takes less than {50 * (stall + lost) / arguments.every_steps:.2f} s")


def state_of(steps: Steps, number: int) -> dict[str, Any]:
    """Return weights and optimizer state as in a checkpoint."""
    return {
        "state_dict": steps.model.state_dict(),
        "optimizer_states": [steps.optimizer.state_dict()],
        "steps_done": number,
    }


def guards(arguments: argparse.Namespace) -> None:
    """Measure the guards of one model's steps."""
    config = composed_config(["model=" + arguments.model])
    length = config.model.max_position_embeddings
    steps = Steps(config, windows=max(1, arguments.batch_tokens // length), length=length)
    for _ in range(3):
        steps.step()
    loss = gradient_norm = torch.tensor(1.0)
    started = time.perf_counter()
    for _ in range(10_000):
        steps.guard(loss, gradient_norm)
    alone = (time.perf_counter() - started) / 10_000
    plain, guarded, ratios = [], [], []
    for _ in range(arguments.rounds):
        pairs = [(steps.step(guarded=False), steps.step(guarded=True)) for _ in range(arguments.repeat)]
        plain += [pair[0] for pair in pairs]
        guarded += [pair[1] for pair in pairs]
        ratios.append(statistics.median(guarded[-arguments.repeat :]) / statistics.median(plain[-arguments.repeat :]))
    median = statistics.median(plain)
    print(
        f"{number_of(parameter_count(config.model), 'parameter')}, "
        f"{number_of(steps.ids[:, 1:].numel(), 'token')} per step"
    )
    print(f"the guards take {1e6 * alone:.0f} microseconds of a step of {1e3 * median:.1f} ms: {alone / median:.3%}")
    print(
        f"step with guards / without: {statistics.median(ratios):.4f} (rounds: {min(ratios):.4f} to {max(ratios):.4f})"
    )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("checkpoint")
    one.add_argument("--model", default="cucafera")
    one.add_argument("--repeat", type=int, default=3)
    one.add_argument("--folder", type=Path, help="folder for checkpoints; default: the system's temporary folder")
    one.add_argument("--every-steps", type=int, default=500, help="of callbacks=long")
    one.add_argument("--step-seconds", type=float, default=11.6, help="default: the original's step on an A100")
    two = commands.add_parser("guards")
    two.add_argument("--model", default="tiny")
    two.add_argument("--batch-tokens", type=int, default=2048)
    two.add_argument("--repeat", type=int, default=10, help="steps per round")
    two.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    {"checkpoint": checkpoint, "guards": guards}[arguments.command](arguments)


if __name__ == "__main__":
    main()
