"""A published training loss beside that of the run."""

import dataclasses

import lightning.pytorch as pl

from cucafera.config import Config
from cucafera.training.events import event_logger
from cucafera.training.module import LanguageModel


@dataclasses.dataclass(frozen=True)
class PublishedLoss:
    """The training loss of a model that others trained.

    Attributes:
        batch_tokens: Tokens of one step.
        losses: Step and loss in nats a token, there. A loss that is a mean stands at the middle of its steps.
    """

    batch_tokens: int
    losses: tuple[tuple[int, float], ...]

    def against_steps(self, batch_tokens: int) -> dict[int, float]:
        """The loss against steps of another batch: each where as many tokens had been seen."""
        return {round(step * self.batch_tokens / batch_tokens): loss for step, loss in self.losses}


PUBLISHED = {
    # github.com/pauhidalgoo/cucafera, log/log.txt: the 245M model on patufet, with its own tokenizer of 65,536 entries;
    # means of 50 steps, and of the last 8.
    "original": PublishedLoss(
        batch_tokens=524_288,
        losses=(
            (25, 9.673), (125, 6.498), (225, 5.484), (525, 4.271), (1025, 3.540), (1525, 3.267), (2025, 3.127),
            (3025, 2.970), (4025, 2.892), (5025, 2.815), (6025, 2.780), (7025, 2.745), (8025, 2.700), (9025, 2.678),
            (10_025, 2.647), (11_004, 2.636),
        ),
    )
}  # fmt: skip
"""By the value of callbacks.reference_curve. A loss depends on text and tokenizer: compare what has the same."""


class ReferenceCurve(pl.Callback):
    """Writes the curve that callbacks.reference_curve names when training begins, up to the end of the budget.

    A run that goes on writes it from its step on, since TensorBoard drops the rest.

    Emits, against those steps of this run that have seen as many tokens: NAME/train_loss, such as original/train_loss.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the curve."""
        assert isinstance(pl_module, LanguageModel)
        name = self.config.callbacks.reference_curve
        if name is None or (logger := event_logger(trainer)) is None:
            return
        for step, loss in PUBLISHED[name].against_steps(int(self.config.batch_tokens)).items():
            if pl_module.steps_done < step <= self.config.total_steps:
                logger.log_metrics({f"{name}/train_loss": loss}, step=step)
