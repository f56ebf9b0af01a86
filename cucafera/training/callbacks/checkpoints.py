"""When checkpoints are saved."""

import logging
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed

from cucafera.config import Config, UserError
from cucafera.training.callbacks.guards import GuardsError, RollBack
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

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses processes that go on from different steps: they would wait for each other for ever.

        Those that a cluster starts one by one may look into the folder before and after another save. Raises UserError.
        """
        if trainer.world_size == 1:
            return
        step = self.writer.saved_step or 0
        ends = torch.tensor([step, -step], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
        last, first = int(ends[0]), -int(ends[1])
        if first != last:
            raise UserError(
                f"the processes of this job found different checkpoints in {self.folder.path}, of steps {first:,} and "
                f"{last:,}: another process has just saved there, or the machines do not share it. Start again"
            )

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
        """Waits for the last checkpoint, all processes together: when one has ended, the others may be ended."""
        self.writer.finish()
        trainer.strategy.barrier()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lets a checkpoint that is being written come to its end; where all processes stop, all wait for it."""
        self.writer.finish()
        if isinstance(exception, RollBack | GuardsError):
            trainer.strategy.barrier()
