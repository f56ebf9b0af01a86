"""Validation on held-out documents."""

from typing import Any

import lightning.pytorch as pl
import torch

from cucafera.config.schema import Config
from cucafera.training.callbacks.base import Callback
from cucafera.training.data_module import data_module_of
from cucafera.training.module import LanguageModel


class Validation(Callback):
    """Validate before the first step, every `validate_every_steps`, and after the last step.

    Lightning's own loop validates after the hooks of a step, so a checkpoint of that step would not contain the result,
    and it validates neither before the first step nor after the last. This callback validates in the step's hooks,
    before samples and checkpoints.

    Emits, against steps, the metrics of the objective (see `Objective.curve`): for next-token objectives
        bpb/val                 bits per UTF-8 byte
        loss/val                nats per token
        val/accuracy            top-1
        val/perplexity
    and against tokens seen, to compare runs with other batch sizes, NAME/val_by_tokens for the first two.

    Attributes:
        history: One record per validation: step, tokens, and each metric.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.history: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the history."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history."""
        self.history = state_dict["history"]

    def done_at(self, step: int) -> dict[str, float] | None:
        """Return the record of the validation after this step, or None."""
        return self.history[-1] if self.history and self.history[-1]["step"] == step else None

    def on_session_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Validate the initial model, or write again the points that TensorBoard drops from a resumed run."""
        first_step, branched = module.steps_done, self.config.schedule.cooldown_start_step or 0
        if first_step == 0:
            self._validate(trainer, module)
            return
        for record in self.history:
            # As a step, the tokens are after the one that the run resumes from. A branch leaves its parent's to it.
            if record["tokens"] > first_step and record["step"] > branched:
                self._write_by_tokens(trainer, module, record)

    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Validate if it is due."""
        every = self.config.validation_steps
        step = module.steps_done
        if step == self.config.total_steps or (every and step % every == 0):
            self._validate(trainer, module)

    @torch.no_grad()
    def _validate(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        module.eval()
        module.validation_metrics.reset()
        with trainer.precision_plugin.val_step_context():
            for index, batch in enumerate(data_module_of(trainer).val_dataloader()):
                module.validation_step(trainer.strategy.batch_to_device(batch), index)
        module.train()
        step = module.steps_done
        metrics = {name: float(value) for name, value in module.validation_metrics.compute().items()}
        self.history.append({"step": step, "tokens": step * self.config.batch_tokens, **metrics})
        for logger in trainer.loggers:
            logger.log_metrics({module.objective.curve(name): value for name, value in metrics.items()}, step=step)
        self._write_by_tokens(trainer, module, self.history[-1])

    def _write_by_tokens(self, trainer: pl.Trainer, module: LanguageModel, record: dict[str, float]) -> None:
        for logger in trainer.loggers:
            curves = {f"{name}/val_by_tokens": record[name] for name in module.objective.comparison_metrics}
            logger.log_metrics(curves, step=int(record["tokens"]))
