"""Signals and time limits: finish the step, save a checkpoint, then stop or continue."""

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

from cucafera.config.errors import EXIT_DIVERGED, EXIT_OUT_OF_TIME, EXIT_WORKER_LOST
from cucafera.config.schema import Config
from cucafera.output import notify
from cucafera.training.callbacks.base import Callback
from cucafera.training.data_module import SIGNALS_OF_A_JOB
from cucafera.training.module import LanguageModel


class Interruption(Callback):
    """Handle signals and the time limit.

    The first SIGINT, SIGTERM or SIGHUP (a closed terminal), reaching max_time, or the death of a worker process
    finishes the step, saves a checkpoint and stops; a second signal exits immediately. Before the first step there is
    nothing to save, so the first signal exits immediately. SIGUSR1 saves a checkpoint, and training continues.

    Two signals never count as the second one. SIGUSR2, with which a sweep stops its jobs: a job may receive it in
    addition to the signal that stopped the sweep. SIGHUP: of a closed terminal, the shell and the system each send one,
    and systemd sends it together with SIGTERM.

    Several devices agree at the next log step, since a signal may have reached only one of them. The object lives as
    long as the run, through all its rollbacks.

    Args:
        config: The run.
        started: Reading of time.monotonic from which max_time counts.

    Attributes:
        exit_code: Exit code of the process; None unless this callback stopped training.
        save_requested: True if a checkpoint is to be saved after this step.
    """

    def __init__(self, config: Config, started: float) -> None:
        self.config = config
        self.deadline = None if config.max_seconds is None else started + config.max_seconds
        self.exit_code: int | None = None
        self.save_requested = False
        self._training = False
        self._code = 0
        self._received: signal.Signals | None = None
        self._stop_signals = 0
        self._save_received = False
        self._worker_lost = "the death of a worker process"
        self._guard = ""

    @property
    def reason(self) -> str:
        """The signal, limit, death or guard that stopped training, for messages."""
        if self.exit_code == EXIT_OUT_OF_TIME:
            return f"max_time={self.config.max_time}"
        if self.exit_code == EXIT_WORKER_LOST:
            return self._worker_lost
        if self.exit_code == EXIT_DIVERGED:
            return self._guard
        assert self.exit_code is not None
        if self.exit_code == 128 + signal.SIGUSR2:
            return "the sweep"
        return signal.Signals(self.exit_code - 128).name

    @contextmanager
    def restore_signal_handlers(self) -> Iterator[None]:
        """Restore the signal handlers at the end of the context, so that another run can follow in this process."""
        before = {number: signal.getsignal(number) for number in SIGNALS_OF_A_JOB}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def install_signal_handlers(self) -> None:
        """Install the handlers for the rest of the run, so that no signal is lost during a rollback."""
        for number in SIGNALS_OF_A_JOB:
            if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN):  # started by nohup
                signal.signal(number, self._on_signal)

    def stop_without_worker(self, reason: str) -> None:
        """Stop after this step, since a worker process has died; `reason` says which, and how."""
        self._worker_lost = reason
        self._code = EXIT_WORKER_LOST

    def stop_for_guard(self, trainer: pl.Trainer, step: int, guard: str) -> None:
        """Stop after this step, with a checkpoint, for the guard of a setting; every process of a job calls it.

        The last step ends training anyway, and is saved.
        """
        if self.exit_code is None and step < self.config.total_steps:
            self._guard, self.exit_code = guard, EXIT_DIVERGED
            trainer.should_stop = self.save_requested = True

    def on_session_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Install the handlers again: Lightning has set its own, which exit with status 0 and save nothing."""
        self.install_signal_handlers()
        self._training = True

    @contextmanager
    def exit_at_signal(self) -> Iterator[None]:
        """Let a signal end the process at once within the context, in which there is nothing to save yet."""
        self._training = False
        try:
            yield
        finally:
            self._training = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self._save_received = True
        elif not self._training:
            sys.exit(128 + number)
        elif number == signal.SIGUSR2:
            self._received = self._received or signal.SIGUSR2
        elif number == signal.SIGHUP:
            if self._received is None:
                self._received = signal.SIGHUP
                notify("SIGHUP received: saving a checkpoint after this step.")
        elif self._stop_signals:
            self._exit_at_once(number)
        else:
            self._stop_signals += 1
            self._received = signal.Signals(number)
            again = "Press Ctrl-C again" if number == signal.SIGINT else "Send it again"
            notify(f"{self._received.name} received: saving a checkpoint after this step. {again} to exit immediately.")

    def _exit_at_once(self, number: int) -> NoReturn:
        os._exit(128 + number)

    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Decide whether to stop or save after this step; `Checkpoints`, later in the same step, saves."""
        self.save_requested = False
        code = self._code if self._received is None else 128 + self._received
        if not code and self.deadline is not None and time.monotonic() > self.deadline:
            code = EXIT_OUT_OF_TIME
        save = self._save_received
        if trainer.world_size > 1:
            if not self.config.is_log_step(module.steps_done):
                return
            requests = torch.tensor([code, save], device=module.device)
            torch.distributed.all_reduce(requests, torch.distributed.ReduceOp.MAX)
            code, save = int(requests[0]), bool(requests[1])
        if module.steps_done == self.config.total_steps:
            return  # training ends with this step, which is saved anyway
        if code:
            self.exit_code = code
            trainer.should_stop = True
        if code or save:
            self._save_received = False
            self.save_requested = True
