"""Save checkpoints when they are due."""

import contextlib
import logging
import re
from typing import cast

import lightning.pytorch as pl
import torch
import torch.distributed

from cucafera.config.errors import UserError
from cucafera.config.schema import Config
from cucafera.data.chatml import tokenizer_description
from cucafera.objectives import Objective
from cucafera.runs.folder import RunFolder
from cucafera.training.callbacks.base import Callback
from cucafera.training.callbacks.guards import GuardsError, RollbackRequest
from cucafera.training.callbacks.interruption import Interruption
from cucafera.training.callbacks.validation import Validation
from cucafera.training.checkpoint_writer import CheckpointWriter
from cucafera.training.data_module import data_of
from cucafera.training.module import LanguageModel
from cucafera.training.sharding import FullySharded

log = logging.getLogger(__name__)

LOST_CONNECTION = re.compile(
    r"gloo.*(Connection|Socket|Read error|Write error|Broken pipe)|NCCL.*(remote|peer)", re.DOTALL
)
"""In the messages of PyTorch's collectives."""


class Checkpoints(Callback):
    """Save every `checkpoint_every_steps`, after the last step, and when a signal or a time limit requests it.

    `CheckpointWriter` writes them, and keeps the last few, the best of those that were validated, and one every
    `keep_every_steps`.
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
        """Refuse processes that start after different steps: their collectives would deadlock.

        A cluster starts processes one by one, and a checkpoint may be saved between the moments at which two of them
        read the folder. Raises UserError.
        """
        if trainer.world_size == 1:
            return
        step = self.writer.first_step
        ends = torch.tensor([step, -step], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
        last, first = int(ends[0]), -int(ends[1])
        if first != last:
            where = self.folder.path if self.writer.saved_step is not None else self.config.init_from
            raise UserError(
                f"the processes of this job found different checkpoints in {where}, of steps {first:,} and "
                f"{last:,}: another process has just saved there, or the machines do not share it. Start again"
            )

    def on_session_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Write the tokenizer into the run folder: checkpoints are of no use without it."""
        data = data_of(trainer)
        if trainer.is_global_zero:
            self.folder.write_tokenizer(data.tokenizer, tokenizer_description(module.objective.stop_id))

    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Save if a checkpoint is due."""
        every = self.config.callbacks.checkpoint_every_steps
        step = module.steps_done
        if step == self.config.total_steps or (every and step % every == 0) or self.interruption.save_requested:
            self._save(trainer, module.objective, step)
            if self.interruption.save_requested and self.interruption.exit_code is None and trainer.is_global_zero:
                self.writer.finish()
                if self.writer.saved_step == step:
                    log.info("Checkpoint saved after step %s, as requested; training continues.", f"{step:,}")

    def _save(self, trainer: pl.Trainer, objective: Objective, step: int) -> None:
        """Save the state after a step; every process of the job calls it."""
        for logger in trainer.loggers:
            logger.save()  # the curves up to a checkpoint are on disk before it is
        validation = self.validation.done_at(step)
        metric = objective.primary_metric
        score = None
        if validation is not None:
            score = {"metric": metric.name, "value": validation[metric.name], "direction": metric.direction}
        trainer.save_checkpoint(self.folder.checkpoints.file_at(step), storage_options=score)

    def on_session_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Wait for the last checkpoint in every process: a launcher may kill the others when one of them has exited."""
        self.writer.finish()
        trainer.strategy.barrier()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Finish a checkpoint that is being written; where every process stops, every process waits for it."""
        self.writer.finish()
        if isinstance(exception, RollbackRequest | GuardsError):
            trainer.strategy.barrier()
        elif is_lost_connection(exception):
            self._save_alone(trainer, cast(LanguageModel, pl_module))

    def _save_alone(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Save the last finished step when another process of the job has died, if this one has all of its state.

        No collective follows a step's update within the step, so weights and moments are those of a finished step.
        """
        has_all = not isinstance(trainer.strategy, FullySharded) and module.device.type == "cpu"
        if trainer.is_global_zero and has_all and module.steps_done > (self.writer.saved_step or 0):
            with contextlib.suppress(RuntimeError):  # the barrier after the save fails
                trainer.save_checkpoint(self.folder.checkpoints.file_at(module.steps_done))
            self.writer.finish()


def is_lost_connection(error: BaseException) -> bool:
    """True for the error of a collective of which another process has died."""
    return isinstance(error, RuntimeError) and bool(LOST_CONNECTION.search(str(error)))
