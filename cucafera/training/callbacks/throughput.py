"""Training curves: loss, gradient norm, learning rate, tokens, speed, memory."""

import dataclasses
import logging
import resource
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch

from cucafera.config.schema import Config
from cucafera.model.flops import training_flops_per_token
from cucafera.training.callbacks.base import Callback
from cucafera.training.callbacks.guards import Guards
from cucafera.training.data_module import data_of
from cucafera.training.hardware import Hardware
from cucafera.training.module import LanguageModel, StepRecord

log = logging.getLogger(__name__)


class Throughput(Callback):
    """Log the training curves on log steps, which wait for the device anyway (see `Config.is_log_step`).

    Emits, against steps:
        loss/train                  mean over all targets of the step, nats
        train/gradient_norm         global norm before clipping
        train/lr/GROUP              learning rate of each parameter group
        train/tokens                tokens seen by the run, including padding
        train/epoch                 passes over the training windows, a fraction
        speed/tokens_per_second     over the steps since the last log step, without validation, samples and checkpoints
        speed/mfu                   against the dense bf16 peak, full-attention convention; only for known GPUs
        speed/data_wait             share of that time spent waiting for data
        memory/peak_gib             peak since the start: of the GPU, or of the process on a CPU
        train/skipped_updates       updates of the run that were not applied; none as long as there is no such update
    """

    def __init__(self, config: Config, hardware: Hardware, guards: Guards) -> None:
        self.config = config
        self.guards = guards
        self.hardware = hardware
        self.flops_per_token = training_flops_per_token(config.model, config.sequence_length, config.adapter)
        self.training_seconds = 0.0
        self.waiting_seconds = 0.0
        self.latest: dict[str, float] = {}
        self.left_out: list[dict[str, Any]] = []
        self._log_step = 0
        self._since = 0.0
        self._paused = 0.0
        self._waited = 0.0
        self._own_hook_done_at = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the last values, what was left out of the data, and the seconds so far, for the report."""
        return {
            "training_seconds": self.training_seconds,
            "waiting_seconds": self.waiting_seconds,
            "latest": self.latest,
            "left_out": self.left_out,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore all that `state_dict` returned."""
        self.training_seconds = state_dict["training_seconds"]
        self.waiting_seconds = state_dict["waiting_seconds"]
        self.latest = state_dict["latest"]
        self.left_out = state_dict["left_out"]

    def on_session_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Report the amounts of text and what was left out of it, write the configuration, and start the clock."""
        data = data_of(trainer)
        self.left_out = [dataclasses.asdict(entry) for entry in data.left_out]
        if trainer.is_global_zero:
            log.info("%s", data.describe())
            for entry in data.left_out:
                if entry.is_large:
                    log.warning("WARNING %s", entry)
                else:
                    log.info("        %s", entry)
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)
        self._log_step = module.steps_done
        self._since = self._own_hook_done_at = time.perf_counter()

    def on_step_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Count the time since the last step as waiting for data, and the time in other callbacks as a pause."""
        self._waited += time.perf_counter() - module.other_hooks_done_at
        self._paused += module.other_hooks_done_at - self._own_hook_done_at

    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Log the curves on a log step."""
        if self.config.is_log_step(module.steps_done):
            assert self.guards.latest is not None
            self._write(trainer, module, self.guards.latest)
        self._own_hook_done_at = time.perf_counter()

    def _write(self, trainer: pl.Trainer, module: LanguageModel, record: StepRecord) -> None:
        step = record.step
        now = time.perf_counter()
        seconds = now - self._since - self._paused
        tokens_per_second = (step - self._log_step) * self.config.batch_tokens / seconds
        self.training_seconds += seconds
        self.waiting_seconds += self._waited
        data = data_of(trainer)
        self.latest = {
            "loss/train": record.loss,
            "train/gradient_norm": record.gradient_norm,
            "train/tokens": step * self.config.batch_tokens,
            "train/epoch": data.epochs_at(step),
            "speed/tokens_per_second": tokens_per_second,
            "speed/data_wait": self._waited / seconds,
            "memory/peak_gib": peak_memory_bytes(module.device) / 2**30,
        }
        if self.guards.skipped_updates:  # a curve that is zero throughout would only be in the way
            self.latest["train/skipped_updates"] = self.guards.skipped_updates
        for number, group in enumerate(trainer.optimizers[0].param_groups):
            self.latest[f"train/lr/{group.get('name', number)}"] = group["lr"]
        if self.hardware.peak_flops is not None:
            achieved = self.flops_per_token * tokens_per_second / self.hardware.world_size
            self.latest["speed/mfu"] = achieved / self.hardware.peak_flops
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step=step)
        self._log_step, self._since, self._paused, self._waited = step, now, 0.0, 0.0


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak since the start: bytes allocated on a GPU, or resident bytes of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts kilobytes on Linux and bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
