"""The base class of callbacks: hooks in steps, typed for the one module that this package trains."""

from typing import Any, cast

import lightning.pytorch as pl
import torch

from cucafera.training.module import LanguageModel


class Callback(pl.Callback):
    """A callback whose hooks take the run's `LanguageModel`; override any of them.

    Lightning declares its hooks for any LightningModule, and a subclass may not narrow the type of an argument. This
    class implements them once and forwards to the hooks below. A Lightning batch is one optimizer step, so these count
    in steps and take no batch. Hooks that need no module, such as `on_exception`, are Lightning's own.
    """

    def on_session_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Run before the first step, with the checkpoint's state restored."""

    def on_step_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Run before each step, when its batch has been read."""

    def on_gradients(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Run in each step when the gradients are complete and clipped; `steps_done` does not count the step yet."""

    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Run after each step; `steps_done` counts it."""

    def on_session_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Run after the last step, or after the step at which a signal or limit stopped training."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forward Lightning's hook."""
        self.on_session_start(trainer, cast(LanguageModel, pl_module))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forward Lightning's hook."""
        self.on_step_start(trainer, cast(LanguageModel, pl_module))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Forward Lightning's hook."""
        self.on_gradients(trainer, cast(LanguageModel, pl_module))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Forward Lightning's hook."""
        self.on_step_end(trainer, cast(LanguageModel, pl_module))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forward Lightning's hook."""
        self.on_session_end(trainer, cast(LanguageModel, pl_module))
