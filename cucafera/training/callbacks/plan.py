"""The learning rate as it is planned, to see it beside what was done."""

import lightning.pytorch as pl

from cucafera.config import Config
from cucafera.training.events import event_logger
from cucafera.training.module import LanguageModel

POINTS = 200
"""About so many of them draw the whole horizon."""


class Plan(pl.Callback):
    """Writes the schedule when training begins; a run that goes on, from its step on, since TensorBoard drops the rest.

    Emits, against steps: schedule/planned, the learning rate of each step up to the horizon or the end of the budget,
    whichever is later. train/lr/GROUP is what was done.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes what is to come."""
        assert isinstance(pl_module, LanguageModel)
        logger = event_logger(trainer)
        if logger is None:
            return
        for step in drawn_steps(self.config):
            if step > pl_module.steps_done:
                # What step 1 is taken with is the learning rate after no step.
                logger.log_metrics({"schedule/planned": pl_module.learning_rate(step - 1)}, step=step)


def drawn_steps(config: Config) -> list[int]:
    """Steps that draw a schedule: its corners, and log steps between them, so that what was done has points there too.

    They are the same whatever step a run goes on from.
    """
    schedule, horizon = config.schedule, config.horizon_steps
    last = max(horizon, config.total_steps)
    log_every = config.callbacks.log_every_steps
    spread = range(0, last, log_every * max(1, round(last / log_every / POINTS)))
    corners = {1, schedule.warmup_steps, schedule.warmup_steps + 1, horizon, horizon + 1, last}
    if schedule.name == "wsd":
        corners.add(horizon - round(schedule.decay_fraction * horizon) + 1)
    return sorted(step for step in corners | set(spread) if 1 <= step <= last)
