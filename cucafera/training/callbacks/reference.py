"""A published training loss as a curve next to that of the run."""

import dataclasses

import lightning.pytorch as pl

from cucafera.config.schema import Config
from cucafera.training.callbacks.base import Callback
from cucafera.training.events import event_logger
from cucafera.training.module import LanguageModel


@dataclasses.dataclass(frozen=True)
class PublishedLoss:
    """Training loss that others published.

    Attributes:
        batch_tokens: Tokens of one step.
        losses: Their step, and the loss in nats per token. A mean over steps is given at the middle of them.
    """

    batch_tokens: int
    losses: tuple[tuple[int, float], ...]

    def against_steps(self, batch_tokens: int) -> dict[int, float]:
        """Return the loss by steps of another batch size, at the same number of tokens seen."""
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
"""By the value of callbacks.reference_curve. A loss depends on text and tokenizer, and compares only with the same."""


class ReferenceCurve(Callback):
    """Write the curve that callbacks.reference_curve names at the start of a session, up to the end of the budget.

    A resumed run writes it from its step on, since TensorBoard drops later points of earlier sessions.

    Emits, against the steps of this run at the same number of tokens: loss/NAME, such as loss/original.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def on_session_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Write the curve."""
        name = self.config.callbacks.reference_curve
        if name is None or (logger := event_logger(trainer)) is None:
            return
        for step, loss in PUBLISHED[name].against_steps(self.config.batch_tokens).items():
            if module.steps_done < step <= self.config.total_steps:
                logger.log_metrics({f"loss/{name}": loss}, step=step)
