"""When checkpoints are saved."""

import logging
from typing import Any

import lightning.pytorch as pl

from cucafera.config import Config
from cucafera.training.callbacks.guards import RollBack
from cucafera.training.callbacks.interruption import Interruption
from cucafera.training.callbacks.validation import Validation
from cucafera.training.checkpoint_files import CheckpointWriter
from cucafera.training.module import LanguageModel, data_module_of
from cucafera.training.run_folder import RunFolder

log = logging.getLogger(__name__)


class Checkpoints(pl.Callback):
    """Saves every `checkpoint_every_steps`, after the last step, and when a signal or a time limit asks for it.

    The last few are kept, the best of those that were validated, and every `keep_every_steps`. How they are written
    is the matter of `CheckpointWriter`.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        writer: CheckpointWriter,
        interruption: Interruption,
        validation: Validation,
    ) -> None:
        self.config = config
        self.folder = folder
        self.writer = writer
        self.interruption = interruption
        self.validation = validation

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
        if step == self.config.total_steps or (every and step % every == 0) or self.interruption.asks_to_save:
            self._save(trainer, step)
            if self.interruption.asks_to_save and self.interruption.exit_code is None and trainer.is_global_zero:
                self.writer.finish()
                if self.writer.saved_step == step:
                    log.info("Saved after step %s, as asked; training goes on.", f"{step:,}")

    def _save(self, trainer: pl.Trainer, step: int) -> None:
        """Saves the state after a step; every process of the job calls it."""
        for logger in trainer.loggers:
            logger.save()  # the curves up to a checkpoint are on disk before it is
        validation = self.validation.done_at(step)
        loss = None if validation is None else validation["loss"]
        trainer.save_checkpoint(self.folder.checkpoints.file_at(step), storage_options=loss)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Waits for the last checkpoint."""
        self.writer.finish()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lets a checkpoint that is being written come to its end; all processes go back to the same one."""
        self.writer.finish()
        if isinstance(exception, RollBack):
            trainer.strategy.barrier()
