"""Guards: what is done about a loss or gradient that is not finite, and about a loss that leaps up."""

import logging
import math
from typing import Any

import lightning.pytorch as pl
import torch

from cucafera.config import EXIT_DIVERGED, Config, GuardsConfig, UserError
from cucafera.training.callbacks.interruption import Interruption
from cucafera.training.first_steps import FirstSteps
from cucafera.training.module import LanguageModel, StepRecord, data_module_of

log = logging.getLogger(__name__)


SMALLEST_DEVIATION = 0.01
"""Of the mean: a loss that hardly varies does not spike whenever it moves."""


class RollBack(Exception):  # noqa: N818 - it is no error: training goes on from the last checkpoint
    """Asks for the last checkpoint, and for some batches to be left out from then on.

    Attributes:
        batches: Numbers of the batches.
        why: What was wrong with them, in words.
    """

    def __init__(self, batches: list[int], why: str) -> None:
        super().__init__(why)
        self.batches = batches
        self.why = why


class GuardsError(UserError):
    """Training cannot go on. As with RollBack, every process of a job raises it after the same step."""

    exit_code = EXIT_DIVERGED


class LossMonitor:
    """Running mean and deviation of the loss, exponentially weighted (Finch, 2009, section 9).

    Args:
        config: How far back it looks, and what a spike is.

    Attributes:
        mean, variance: Of the losses so far, in nats and nats squared.
        steps: How many there were.
    """

    def __init__(self, config: GuardsConfig) -> None:
        self.config = config
        self.mean = 0.0
        self.variance = 0.0
        self.steps = 0

    def deviations(self, loss: float) -> float:
        """Takes a finite loss in. Returns how many deviations it lies above the mean before it; 0 while too few."""
        above = 0.0
        if self.steps >= self.config.spike_window_steps:
            deviation = max(math.sqrt(self.variance), SMALLEST_DEVIATION * self.mean)
            above = (loss - self.mean) / deviation
            # A spike moves the mean only as far as the largest loss that is none would.
            loss = min(loss, self.mean + self.config.spike_deviations * deviation)
        self.steps += 1
        weight = max(1 / self.steps, 2 / (self.config.spike_window_steps + 1))
        difference = loss - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference**2)
        return above

    def state_dict(self) -> dict[str, float]:
        """Mean, variance and count."""
        return {"mean": self.mean, "variance": self.variance, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Takes them back."""
        self.mean, self.variance = state_dict["mean"], state_dict["variance"]
        self.steps = int(state_dict["steps"])


class Guards(pl.Callback):
    """Looks at the losses and gradient norms of all steps, on log steps, before anything is written or saved.

    The module itself keeps an update from being applied whose loss or gradient is not finite; what else is done about
    it is decided here, when the device is waited for anyway. So no checkpoint holds what was not looked at.

    Raises GuardsError and RollBack.

    Attributes:
        latest: What was read last, of the last step.
        skipped_updates: Updates of the run that were not applied.
        left_out_batches: Numbers of the batches that rollbacks have left out.
    """

    def __init__(self, config: Config, interruption: Interruption, left_out_batches: list[int]) -> None:
        self.config = config
        self.guards = config.callbacks.guards
        self.interruption = interruption
        self.monitor = LossMonitor(self.guards)
        self.latest: StepRecord | None = None
        self.skipped_updates = 0
        self.left_out_batches = left_out_batches
        self._skipped_in_a_row = 0
        self._first_steps_are_judged = False
        self._skipped_first = False

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far."""
        return {
            "monitor": self.monitor.state_dict(),
            "skipped_updates": self.skipped_updates,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it back."""
        self.monitor.load_state_dict(state_dict["monitor"])
        self.skipped_updates = state_dict["skipped_updates"]
        self._skipped_in_a_row = state_dict["skipped_in_a_row"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """On a log step, or before a save: judges all steps since the last time."""
        assert isinstance(pl_module, LanguageModel)
        if self.config.is_log_step(pl_module.steps_done) or self.interruption.asks_to_save:
            records = pl_module.read_steps()
            self.latest = records[-1]
            self._judge(trainer, records)
            self._judge_first_steps(pl_module.first_steps, records)

    def _judge(self, trainer: pl.Trainer, records: list[StepRecord]) -> None:
        broken, spikes = [], []
        for record in records:
            if record.applied:
                if record.gradient_norm == 0 and record.loss > 0:
                    raise GuardsError(
                        _nothing_is_trained(
                            f"the gradient of step {record.step:,} was exactly zero, at a loss of {record.loss:.3f}"
                        )
                    )
                self._skipped_in_a_row = 0
                mean = self.monitor.mean
                above = self.monitor.deviations(record.loss)
                if above > self.guards.spike_deviations:
                    spikes.append(record)
                    if self.guards.loss_spike != "ignore" and trainer.is_global_zero:
                        log.warning(
                            "Step %s: its loss of %.3f lies %.1f standard deviations above the running mean, %.3f",
                            f"{record.step:,}", record.loss, above, mean,
                        )  # fmt: skip
                continue
            broken.append(record)
            self.skipped_updates += 1
            self._skipped_in_a_row += 1
            if trainer.is_global_zero:
                log.warning(
                    "Step %s: loss %s, gradient norm %s: the update was not applied",
                    f"{record.step:,}", f"{record.loss:g}", f"{record.gradient_norm:g}",
                )  # fmt: skip
            if self._skipped_in_a_row > self.guards.most_in_a_row and self.guards.non_finite == "skip":
                raise GuardsError(self._advice(f"{self._skipped_in_a_row} updates in a row were not finite"))
        if broken and self.guards.non_finite == "stop":
            raise GuardsError(self._advice(f"the update of step {broken[0].step:,} was not finite"))
        offending = broken if self.guards.non_finite == "rollback" else []
        offending += spikes if self.guards.loss_spike == "rollback" else []
        if offending:
            offending.sort()
            steps, first = data_module_of(trainer).training_steps, offending[0]
            what = f"had a loss of {first.loss:.3f}, a spike" if first.applied else "was not finite"
            batches = [steps.batch_at(record.step - 1) for record in offending]
            raise RollBack(batches, f"Step {first.step:,} {what}")

    def _judge_first_steps(self, first_steps: FirstSteps, records: list[StepRecord]) -> None:
        """Raises GuardsError if the first steps of this session did not train every weight."""
        self._skipped_first |= any(not record.applied for record in records if record.step <= first_steps.last_step)
        if self._first_steps_are_judged or not first_steps.has_seen_enough:
            return
        self._first_steps_are_judged = True
        if not self._skipped_first and (fault := first_steps.fault()):
            raise GuardsError(_nothing_is_trained(fault))

    def _advice(self, what: str) -> str:
        return (
            f"{what}, and none was applied; training stops here. Lower optimizer.lr, lengthen schedule.warmup_steps or "
            "set optimizer.clip_norm, and go on from the last checkpoint with 'resume_despite=[optimizer,schedule]' "
            "(or begin anew with resume=overwrite); callbacks.guards.non_finite=rollback leaves out the batch"
        )


def _nothing_is_trained(what: str) -> str:
    return (
        f"{what}: the model is not being trained, and training stops here. No data does that; if trainer.compile is "
        f"on, train with trainer.compile=false, or with another version of PyTorch (this is {torch.__version__})"
    )
