"""Ctrl-C and SIGTERM: finish the step, save, stop."""

import os
import signal
from types import FrameType
from typing import Any

import lightning.pytorch as pl

from cucafera.training.callbacks.throughput import Throughput
from cucafera.training.module import LanguageModel


class Interruption(pl.Callback):
    """On the first SIGINT or SIGTERM finishes the step, saves a checkpoint and ends; on the second exits at once.

    With several devices they agree at the next log step, since the signal may have reached only one of them.

    Attributes:
        received: The signal that ended training, or None.
    """

    def __init__(self, throughput: Throughput) -> None:
        self.throughput = throughput
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the signals over; Lightning's own handler would end with status 0 and save nothing."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops if a signal came; `Checkpoints`, which runs later in the same step, saves."""
        assert isinstance(pl_module, LanguageModel)
        step = pl_module.steps_done
        stop = self.received is not None
        if trainer.world_size > 1:
            if not self.throughput.is_log_step(step):
                return
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
            if stop and self.received is None:
                self.received = signal.SIGTERM
        if stop:
            trainer.should_stop = True

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Gives the signals back, so that a later run of the process starts afresh."""
        self._give_back()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Gives the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
