"""Training curves: loss, gradient norm, learning rate, tokens, speed, memory."""

import logging
import math
import resource
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf

from cucafera.config import Config, UserError
from cucafera.model.flops import training_flops_per_token
from cucafera.training.hardware import Hardware
from cucafera.training.module import LanguageModel, data_module_of

log = logging.getLogger(__name__)


class Throughput(pl.Callback):
    """Reads the device's losses on log steps only, so that between them the device is never waited for.

    A log step is one at which something is written: curves, a validation, a checkpoint, and the last step.

    Emits the configuration as the text `config`, and against steps:
        train/loss                  mean over all targets of the step, nats
        train/gradient_norm         global norm before clipping
        train/lr/GROUP              learning rate of each parameter group
        train/tokens                tokens seen by the whole run, padding included
        train/epoch                 passes over the training windows, a fraction
        speed/tokens_per_second     over the steps since the last log step; validation, samples and checkpoints left out
        speed/mfu                   against the dense bf16 peak, full-attention convention; only for known GPUs
        speed/data_wait             share of that time spent waiting for data
        memory/peak_gib             most memory in use since the start: of the GPU, or of the process on a CPU

    Raises UserError on a log step whose loss or gradient norm is not finite.
    """

    def __init__(self, config: Config, hardware: Hardware) -> None:
        self.config = config
        self.hardware = hardware
        self.flops_per_token = training_flops_per_token(config.model, config.sequence_length, config.adapter)
        self.training_seconds = 0.0
        self.waiting_seconds = 0.0
        self.latest: dict[str, float] = {}
        self._log_step = 0
        self._since = 0.0
        self._paused = 0.0
        self._waited = 0.0
        self._own_hook_done_at = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Seconds spent so far, so that a resumed run reports its whole time, and the last figures."""
        return {
            "training_seconds": self.training_seconds,
            "waiting_seconds": self.waiting_seconds,
            "latest": self.latest,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them back."""
        self.training_seconds = state_dict["training_seconds"]
        self.waiting_seconds = state_dict["waiting_seconds"]
        self.latest = state_dict["latest"]

    def is_log_step(self, step: int) -> bool:
        """Whether something is written after this step."""
        callbacks = self.config.callbacks
        intervals = (callbacks.log_every_steps, callbacks.validate_every_steps, callbacks.checkpoint_every_steps)
        return step == self.config.total_steps or any(interval and step % interval == 0 for interval in intervals)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tells the amounts of text, writes the configuration, and starts the clock."""
        assert isinstance(pl_module, LanguageModel)
        data = data_module_of(trainer)
        if trainer.is_global_zero:
            log.info("%s", data.describe())
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                text = f"```yaml\n{OmegaConf.to_yaml(OmegaConf.structured(self.config))}```"
                logger.experiment.add_text("config", text, pl_module.steps_done)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._log_step = pl_module.steps_done
        self._since = self._own_hook_done_at = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Counts the time since the last step as waiting, and the time in other callbacks as a pause."""
        assert isinstance(pl_module, LanguageModel)
        self._waited += time.perf_counter() - pl_module.other_hooks_done_at
        self._paused += pl_module.other_hooks_done_at - self._own_hook_done_at

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """On a log step: waits for the device, and writes the curves."""
        assert isinstance(pl_module, LanguageModel)
        step = pl_module.steps_done
        if self.is_log_step(step):
            loss = float(trainer.strategy.reduce(outputs["loss"], reduce_op="sum"))
            gradient_norm = float(outputs["gradient_norm"])
            self._write(trainer, pl_module, step, loss, gradient_norm)
            if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
                raise UserError(
                    f"by step {step:,} the run has diverged: the loss is {loss}, the gradient norm {gradient_norm}. "
                    "Lower optimizer.lr, lengthen schedule.warmup_steps, or set optimizer.clip_norm; then begin anew "
                    "with resume=overwrite or another name"
                )
        self._own_hook_done_at = time.perf_counter()

    def _write(self, trainer: pl.Trainer, module: LanguageModel, step: int, loss: float, gradient_norm: float) -> None:
        now = time.perf_counter()
        seconds = now - self._since - self._paused
        tokens_per_second = (step - self._log_step) * int(self.config.batch_tokens) / seconds
        self.training_seconds += seconds
        self.waiting_seconds += self._waited
        data = data_module_of(trainer)
        self.latest = {
            "train/loss": loss,
            "train/gradient_norm": gradient_norm,
            "train/tokens": step * int(self.config.batch_tokens),
            "train/epoch": data.epochs_at(step),
            "speed/tokens_per_second": tokens_per_second,
            "speed/data_wait": self._waited / seconds,
            "memory/peak_gib": peak_memory_bytes(module.device) / 2**30,
        }
        for group in trainer.optimizers[0].param_groups:
            self.latest[f"train/lr/{group['name']}"] = group["lr"]
        if self.hardware.peak_flops is not None:
            achieved = self.flops_per_token * tokens_per_second / self.hardware.world_size
            self.latest["speed/mfu"] = achieved / self.hardware.peak_flops
        for logger in trainer.loggers:
            logger.log_metrics(self.latest, step=step)
        self._log_step, self._since, self._paused, self._waited = step, now, 0.0, 0.0


def peak_memory_bytes(device: torch.device) -> int:
    """Most bytes in use since the start: allocated on a GPU; resident, of the process, on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts kilobytes, but on macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
