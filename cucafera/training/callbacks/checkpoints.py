"""Checkpoints: whole or not there."""

import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from cucafera.config import Config, UserError
from cucafera.training.callbacks.validation import Validation
from cucafera.training.module import LanguageModel, data_module_of
from cucafera.training.run_folder import RunFolder


class Checkpoints(pl.Callback):
    """Saves every `checkpoint_every_steps`, after the last step, and when training is told to stop.

    The last few are kept, and the best. A checkpoint is written under another name, flushed to disk, and renamed: a
    file named step-*.ckpt is whole. best.ckpt is a second name of the checkpoint with the lowest validation loss; only
    steps that are both validated and saved can be the best.
    """

    def __init__(self, config: Config, folder: RunFolder, validation: Validation) -> None:
        self.config = config
        self.folder = folder
        self.validation = validation
        self.best_loss: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """The loss to beat."""
        return {"best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it back."""
        self.best_loss = state_dict["best_loss"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the tokenizer beside the checkpoints: without it they are of no use."""
        data = data_module_of(trainer)
        if trainer.is_global_zero:
            self.folder.write_tokenizer(data.tokenizer, data.stop_id)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves when it is due."""
        assert isinstance(pl_module, LanguageModel)
        every = self.config.callbacks.checkpoint_every_steps
        step = pl_module.steps_done
        if step == self.config.total_steps or (every and step % every == 0) or trainer.should_stop:
            self.save(trainer, step)

    def save(self, trainer: pl.Trainer, step: int) -> None:
        """Saves the state after a step; every process of the job calls it."""
        validation = self.validation.done_at(step)
        is_best = validation is not None and (self.best_loss is None or validation["loss"] < self.best_loss)
        if is_best and validation is not None:
            self.best_loss = validation["loss"]
        for logger in trainer.loggers:
            logger.save()  # the curves up to a checkpoint are on disk before it is
        path = self.folder.checkpoint_at(step)
        temporary = path.with_suffix(".tmp")
        try:
            trainer.save_checkpoint(temporary)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"the checkpoint of step {step:,} cannot be written to {self.folder.checkpoints}: "
                f"{error.strerror or error}. Those before it are whole: make room, and the same command goes on"
            ) from error
        if trainer.is_global_zero:
            _flush_to_disk(temporary)
            temporary.replace(path)
            if is_best:
                _link(path, self.folder.best_checkpoint)
            for old in self.folder.step_checkpoints()[: -self.config.callbacks.keep_last]:
                old.unlink()
            _flush_to_disk(self.folder.checkpoints)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(path: Path, name: Path) -> None:
    temporary = name.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a disk without hard links, as many network volumes are
        shutil.copyfile(path, temporary)
    temporary.replace(name)
