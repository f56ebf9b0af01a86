"""Validation on held-out documents."""

from typing import Any

import lightning.pytorch as pl
import torch

from cucafera.config import Config
from cucafera.training.module import LanguageModel, data_module_of


class Validation(pl.Callback):
    """Validates before the first step, every `validate_every_steps`, and after the last step.

    Lightning's own loop validates after the hooks of a step, so a checkpoint of that step would not know the result,
    and it has no first and last time. Here validation is part of the step's hooks, ahead of samples and checkpoints.

    What is measured are the targets: every token of documents, the assistant's tokens of conversations.

    Emits, against steps: val/loss (nats a token), val/perplexity, val/accuracy (share of tokens that were the
    likeliest), val/bpb (bits a UTF-8 byte). And against tokens seen, so that runs with other batches can be compared:
    by_tokens/val_loss, by_tokens/val_bpb.

    Attributes:
        history: One record a validation: step, tokens, loss, perplexity, accuracy, bpb.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.history: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """The history."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the history back."""
        self.history = state_dict["history"]

    def done_at(self, step: int) -> dict[str, float] | None:
        """The record of a validation after this step, if there was one."""
        return self.history[-1] if self.history and self.history[-1]["step"] == step else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures what the curve falls from, or writes again what TensorBoard drops of a run that goes on."""
        assert isinstance(pl_module, LanguageModel)
        first_step = pl_module.steps_done
        if first_step == 0:
            self._validate(trainer, pl_module)
            return
        for record in self.history:
            if record["tokens"] > first_step:  # TensorBoard takes them for steps behind the one that is gone on from
                self._write_by_tokens(trainer, record)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Validates when it is due."""
        assert isinstance(pl_module, LanguageModel)
        every = self.config.callbacks.validate_every_steps
        step = pl_module.steps_done
        if step == self.config.total_steps or (every and step % every == 0):
            self._validate(trainer, pl_module)

    @torch.no_grad()
    def _validate(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        data = data_module_of(trainer)
        module.eval()
        module.validation_metrics.reset()
        with trainer.precision_plugin.val_step_context():
            for index, batch in enumerate(data.val_dataloader()):
                module.validation_step(trainer.strategy.batch_to_device(batch), index)
        module.train()
        step = module.steps_done
        measured = {name: float(value) for name, value in module.validation_metrics.compute().items()}
        self.history.append({"step": step, "tokens": step * int(self.config.batch_tokens), **measured})
        for logger in trainer.loggers:
            logger.log_metrics({f"val/{name}": value for name, value in measured.items()}, step=step)
        self._write_by_tokens(trainer, self.history[-1])

    def _write_by_tokens(self, trainer: pl.Trainer, record: dict[str, float]) -> None:
        for logger in trainer.loggers:
            curves = {f"by_tokens/val_{name}": record[name] for name in ("loss", "bpb")}
            logger.log_metrics(curves, step=int(record["tokens"]))
