"""Progress of training on the terminal and in run.log."""

import logging
import sys
from typing import Any

import lightning.pytorch as pl
from tqdm import tqdm

from cucafera.config.schema import Config
from cucafera.objectives import Objective
from cucafera.output import bar_output
from cucafera.quantities import duration, rounded
from cucafera.training.callbacks.base import Callback
from cucafera.training.callbacks.throughput import Throughput
from cucafera.training.callbacks.validation import Validation
from cucafera.training.module import LanguageModel

log = logging.getLogger("cucafera.steps")


class Progress(Callback):
    """Show a progress bar on a terminal, and one line per log step elsewhere; run.log gets the lines in both cases."""

    def __init__(self, config: Config, throughput: Throughput, validation: Validation) -> None:
        self.config = config
        self.throughput = throughput
        self.validation = validation
        self._bar: tqdm[Any] | None = None

    def on_session_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Open the bar, and show the first validation of a new run."""
        if not trainer.is_global_zero:
            return
        self._show_validation(module.steps_done, module.objective)
        if sys.stdout.isatty():
            self._bar = tqdm(
                total=self.config.total_steps,
                initial=module.steps_done,
                unit="step",
                file=bar_output(sys.stdout),
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| step {n:,}/{total:,}{postfix}",
            )

    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Update the bar, or write a line."""
        if not trainer.is_global_zero:
            return
        step = module.steps_done
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        if self.config.is_log_step(step):
            latest = self.throughput.latest
            figures = [f"loss {latest['loss/train']:.3f}"]  # first what matters: a narrow terminal cuts the rest
            if tokens_left := (self.config.total_steps - step) * self.config.batch_tokens:
                figures.append(f"{duration(tokens_left / latest['speed/tokens_per_second'])} left")
            figures.append(f"{rounded(latest['speed/tokens_per_second'])} tokens/s")
            if "speed/mfu" in latest:
                figures.append(f"MFU {latest['speed/mfu']:.1%}")
            figures.append(f"{rounded(latest['train/tokens'])} tokens")
            if self._bar is not None:
                self._bar.set_postfix_str(", ".join(figures))
            self._line("  ".join([f"step {step:>6,}/{self.config.total_steps:,}", *figures]))
            self._show_validation(step, module.objective)

    def _show_validation(self, step: int, objective: Objective) -> None:
        if record := self.validation.done_at(step):
            shown = [objective.metric(name) for name in objective.comparison_metrics]
            values = "  ".join(f"{metric.name} {record[metric.name]:{metric.format}}" for metric in shown)
            line = f"step {step:>6,}  validation {values}"
            if self._bar is not None:
                self._bar.write(line, file=sys.stdout)
            self._line(line)

    def _line(self, text: str) -> None:
        log.info(text)
        if not sys.stdout.isatty():
            print(text, flush=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar before the error message."""
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
