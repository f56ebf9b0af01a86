"""Signals and time limits: finish the step, save, stop or go on."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import lightning.pytorch as pl
import torch
import torch.distributed

from cucafera.config import EXIT_OUT_OF_TIME, Config
from cucafera.training.module import LanguageModel

ANSWERED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interruption(pl.Callback):
    """Answers signals, and watches the time.

    The first SIGINT or SIGTERM, and the end of max_time, finish the step, save a checkpoint and stop; a second signal
    ends the process at once. Before the first step there is nothing to save, and the first does. SIGUSR1 saves a
    checkpoint, and training goes on. SIGUSR2, with which a sweep stops its jobs, never counts as the second: a job
    may get it beside the signal that stopped the sweep.

    With several devices they agree at the next log step, since a signal may have reached only one of them.
    One lives as long as the run, through all its rollbacks.

    Args:
        config: The run.
        started: Reading of time.monotonic when the time began.

    Attributes:
        exit_code: What the process should end with; None unless training was stopped here.
        asks_to_save: Whether a checkpoint is to be saved after this step.
    """

    def __init__(self, config: Config, started: float) -> None:
        self.config = config
        self.deadline = None if config.max_seconds is None else started + config.max_seconds
        self.exit_code: int | None = None
        self.asks_to_save = False
        self._training = False
        self._received: signal.Signals | None = None
        self._counted = 0
        self._save_received = False

    @property
    def reason(self) -> str:
        """Why training was stopped, in words."""
        if self.exit_code == EXIT_OUT_OF_TIME:
            return f"max_time={self.config.max_time}"
        assert self.exit_code is not None
        if self.exit_code == 128 + signal.SIGUSR2:
            return "the sweep"
        return signal.Signals(self.exit_code - 128).name

    @contextmanager
    def giving_back(self) -> Iterator[None]:
        """Gives the signals back at the end of a run, so that a later one starts afresh."""
        before = {number: signal.getsignal(number) for number in ANSWERED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def take_over(self) -> None:
        """Takes the signals over, for the rest of the run: between a rollback and the next step none is lost."""
        for number in ANSWERED:
            signal.signal(number, self._on_signal)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes them over once more: Lightning's own handlers would end with status 0 and save nothing."""
        self.take_over()
        self._training = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._save_received = True
        elif not self._training:
            sys.exit(128 + number)
        elif number == signal.SIGUSR2:
            self._received = self._received or signal.SIGUSR2
        elif self._counted:
            self._exit_at_once(number)
        else:
            self._counted += 1
            self._received = signal.Signals(number)
            # Not through the log, which the signal may have interrupted.
            told = f"\n{self._received.name}: finishing the step and saving. Once more to end at once.\n"
            os.write(sys.stderr.fileno(), told.encode())

    def _exit_at_once(self, number: int) -> NoReturn:
        os._exit(128 + number)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Decides whether this step is the last one, or is saved; `Checkpoints`, later in the same step, saves."""
        assert isinstance(pl_module, LanguageModel)
        self.asks_to_save = False
        code = 0 if self._received is None else 128 + self._received
        if not code and self.deadline is not None and time.monotonic() > self.deadline:
            code = EXIT_OUT_OF_TIME
        save = self._save_received
        if trainer.world_size > 1:
            if not self.config.is_log_step(pl_module.steps_done):
                return
            wishes = torch.tensor([code, save], device=pl_module.device)
            torch.distributed.all_reduce(wishes, torch.distributed.ReduceOp.MAX)
            code, save = int(wishes[0]), bool(wishes[1])
        if pl_module.steps_done == self.config.total_steps:
            return  # it is over, and saved anyway
        if code:
            self.exit_code = code
            trainer.should_stop = True
        if code or save:
            self._save_received = False
            self.asks_to_save = True
