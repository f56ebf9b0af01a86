"""Histograms of weights and gradients, for those who look for a fault."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from cucafera.config import Config
from cucafera.training.events import event_logger
from cucafera.training.module import LanguageModel
from cucafera.training.sharding import whole


class Histograms(pl.Callback):
    """Draws every trained parameter and its gradient, every `histogram_every_steps`.

    The device is waited for, and all is copied to main memory: this is slow for a large model.

    Emits, against steps, for each parameter NAME that is trained:
        weights/NAME    the values after the step
        gradients/NAME  what they were updated with, after clipping; values that are not finite are left out
    """

    def __init__(self, config: Config) -> None:
        self.every = config.callbacks.histogram_every_steps

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Draws the gradients, while there are any."""
        assert isinstance(pl_module, LanguageModel)
        step = pl_module.steps_done + 1
        if step % self.every == 0:
            for name, parameter in pl_module.model.named_parameters():
                if parameter.grad is not None:
                    self._draw(trainer, f"gradients/{name}", parameter.grad, step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draws the weights."""
        assert isinstance(pl_module, LanguageModel)
        step = pl_module.steps_done
        if step % self.every == 0:
            for name, parameter in pl_module.model.named_parameters():
                if parameter.requires_grad:
                    self._draw(trainer, f"weights/{name}", parameter.detach(), step)

    def _draw(self, trainer: pl.Trainer, tag: str, values: Tensor, step: int) -> None:
        values = whole(values)  # every process of the job takes part
        if logger := event_logger(trainer):
            finite = values[values.isfinite()]
            if len(finite):
                logger.experiment.add_histogram(tag, finite, step)
