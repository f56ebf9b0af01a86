"""The terminal during training."""

import logging
import sys
from typing import Any

import lightning.pytorch as pl
from tqdm import tqdm

from cucafera.config import Config
from cucafera.training.callbacks.throughput import Throughput
from cucafera.training.callbacks.validation import Validation
from cucafera.training.module import LanguageModel

log = logging.getLogger("cucafera.steps")


class Progress(pl.callbacks.ProgressBar):
    """A bar on a terminal, plain lines elsewhere, and the lines in run.log either way: one a log step."""

    def __init__(self, config: Config, throughput: Throughput, validation: Validation) -> None:
        super().__init__()
        self.config = config
        self.throughput = throughput
        self.validation = validation
        self._bar: tqdm[Any] | None = None

    def disable(self) -> None:
        """Lightning asks for this on all but the first device; each hook looks for itself."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the bar; a new run's first validation is told."""
        assert isinstance(pl_module, LanguageModel)
        if not trainer.is_global_zero:
            return
        self._tell_validation(pl_module.steps_done)
        if sys.stdout.isatty():
            self._bar = tqdm(
                total=self.config.total_steps,
                initial=pl_module.steps_done,
                unit="step",
                file=sys.stdout,
                dynamic_ncols=True,
                bar_format="{desc}{percentage:3.0f}%|{bar}| step {n}/{total} [{elapsed}, {remaining} left]{postfix}",
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar, or writes a line."""
        assert isinstance(pl_module, LanguageModel)
        if not trainer.is_global_zero:
            return
        step = pl_module.steps_done
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        if self.config.is_log_step(step):
            latest = self.throughput.latest
            speed = f"{count(latest['train/tokens'])} tokens  loss {latest['train/loss']:.3f}  "
            speed += f"{count(latest['speed/tokens_per_second'])} tokens/s"
            if "speed/mfu" in latest:
                speed += f"  MFU {latest['speed/mfu']:.1%}"
            if self._bar is not None:
                self._bar.set_postfix_str(speed)
            left = (self.config.budget_tokens - latest["train/tokens"]) / latest["speed/tokens_per_second"]
            self._line(f"step {step:>6,}/{self.config.total_steps:,}  {speed}  {duration(left)} left")
            self._tell_validation(step)

    def _tell_validation(self, step: int) -> None:
        if record := self.validation.done_at(step):
            line = f"step {step:>6,}  validation loss {record['loss']:.3f}  bpb {record['bpb']:.3f}"
            if self._bar is not None:
                self._bar.write(line)
            self._line(line)

    def _line(self, text: str) -> None:
        log.info(text)
        if not sys.stdout.isatty():
            print(text, flush=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Closes the bar before the message."""
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Closes the bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def count(number: float) -> str:
    """A large number in three digits and a letter: 1.64M, 45.2k."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds in words short enough for a line."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
