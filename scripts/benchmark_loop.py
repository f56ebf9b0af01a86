"""What Lightning costs: the real training path beside a bare PyTorch loop of the same model, batches and optimizer.

    python scripts/benchmark_loop.py                                 the quickstart's model and batch
    python scripts/benchmark_loop.py --rounds 9 model.hidden_size=96 any override of the configuration

The two run in turn, round by round, in one process. A step's time is from the end of one step to the end of the next:
it holds data loading and every callback. Validation, samples and checkpoints are switched off, since the bare loop
has none.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from cucafera.composition import composed_config
from cucafera.config import Config
from cucafera.data.packed import PackedDataModule
from cucafera.model.transformer import Decoder
from cucafera.training.callbacks.interruption import Interruption
from cucafera.training.hardware import Hardware, decide_hardware
from cucafera.training.module import LanguageModel
from cucafera.training.optimizers import build_optimizer, set_learning_rate
from cucafera.training.run_folder import RunFolder
from cucafera.training.schedules import lr_ratio
from cucafera.training.trainer import build_callbacks, build_trainer


class StepTimes(pl.Callback):
    """The time at the end of each step, after the hooks of all other callbacks."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.ends.append(time.perf_counter())


def lightning_round(config: Config, hardware: Hardware, data: PackedDataModule) -> tuple[list[float], float]:
    """Seconds of each step but the first, and the share of the time spent waiting for data."""
    with tempfile.TemporaryDirectory() as directory:
        folder = RunFolder(Path(directory))
        interruption = Interruption(config, time.monotonic())
        callbacks = build_callbacks(config, hardware, folder, None, [], interruption, [])
        trainer = build_trainer(config, hardware, folder, callbacks, first_step=0)
        times = StepTimes()
        # What remains are signals, guards and curves; the rest does nothing between validations and checkpoints.
        trainer.callbacks = [callbacks.interruption, callbacks.guards, callbacks.throughput, times]  # type: ignore[attr-defined]
        torch.manual_seed(config.seed)
        module = LanguageModel(config, hardware.micro_batch_windows, hardware.compile)
        trainer.fit(module, data)
        throughput = callbacks.throughput
    return step_times(times.ends), throughput.waiting_seconds / throughput.training_seconds


def bare_round(config: Config, hardware: Hardware, data: PackedDataModule) -> list[float]:
    """Seconds of each step but the first, of a loop with nothing around it."""
    torch.manual_seed(config.seed)
    model = Decoder(config.model)
    if hardware.compile:
        model.compile()
    optimizer = build_optimizer(model, config.optimizer)
    ends = []
    for step in range(config.total_steps):
        batch = data.training_steps[step]
        set_learning_rate(optimizer, config.optimizer.lr * lr_ratio(step, config.schedule, config.horizon_steps))
        for micro_batch in batch.split(hardware.micro_batch_windows):
            loss = model(micro_batch.input_ids, micro_batch.targets, micro_batch.documents) / batch.targets.numel()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ends.append(time.perf_counter())
    return step_times(ends)


def step_times(ends: list[float]) -> list[float]:
    """Seconds from the end of each step to the end of the next."""
    return [after - before for before, after in itertools.pairwise(ends)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each loop")
    parser.add_argument("--steps", type=int, default=11, help="steps of a round; the first is not counted")
    parser.add_argument("overrides", nargs="*", help="overrides of the configuration")
    arguments = parser.parse_args()

    config = composed_config(["trainer=cpu", "schedule.warmup_steps=0", *arguments.overrides])
    config.budget_tokens = arguments.steps * int(config.batch_tokens)
    config.callbacks.validate_every_steps = config.callbacks.checkpoint_every_steps = 0
    hardware = decide_hardware(config)
    data = PackedDataModule(config)
    data.prepare_data()
    data.setup()

    lightning, bare, ratios, waits = [], [], [], []
    for number in range(arguments.rounds):
        bare_times = bare_round(config, hardware, data)
        lightning_times, wait = lightning_round(config, hardware, data)
        ratios.append(statistics.median(lightning_times) / statistics.median(bare_times))
        lightning += lightning_times
        bare += bare_times
        waits.append(wait)
        print(f"round {number + 1}: ratio {ratios[-1]:.3f}", flush=True)
    for name, times in (("bare loop", bare), ("cucafera", lightning)):
        low, median, high = (1000 * quartile for quartile in statistics.quantiles(times, n=4))
        print(f"{name:<10} {median:8.1f} ms a step (quartiles {low:.1f} to {high:.1f})")
    print(f"cucafera / bare loop: {statistics.median(ratios):.3f} (median of {arguments.rounds} rounds)")
    print(f"waiting for data: {statistics.median(waits):.3%} of a step")


if __name__ == "__main__":
    main()
