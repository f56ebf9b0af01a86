"""Guards against non-finite losses and gradients, and against loss spikes."""

import logging
import math
from typing import Any

import lightning.pytorch as pl
import torch

from cucafera.config.errors import EXIT_DIVERGED, UserError
from cucafera.config.registry import OPTIMIZERS
from cucafera.config.schema import Config, GuardsConfig
from cucafera.training.callbacks.base import Callback
from cucafera.training.callbacks.interruption import Interruption
from cucafera.training.data_module import data_module_of
from cucafera.training.first_steps import FirstSteps
from cucafera.training.module import LanguageModel, StepRecord

log = logging.getLogger(__name__)


MIN_RELATIVE_DEVIATION = 0.01
"""Smallest standard deviation, as a share of the mean: else a loss that hardly varies would spike at any movement."""


class RollbackRequest(Exception):  # noqa: N818 - not an error: training resumes from the last checkpoint
    """Request to resume from the last checkpoint and to skip some batches from then on.

    Attributes:
        batches: Numbers of the batches.
        reason: What was wrong with them.
    """

    def __init__(self, batches: list[int], reason: str) -> None:
        super().__init__(reason)
        self.batches = batches
        self.reason = reason


class GuardsError(UserError):
    """Training cannot continue. As with RollbackRequest, every process of a job raises it after the same step."""

    exit_code = EXIT_DIVERGED


class LossMonitor:
    """Exponentially weighted mean and variance of the loss (Finch, 2009, section 9).

    Args:
        config: Window and threshold of a spike.

    Attributes:
        mean, variance: Of the losses so far, in nats and nats squared.
        steps: Number of losses so far.
    """

    def __init__(self, config: GuardsConfig) -> None:
        self.config = config
        self.mean = 0.0
        self.variance = 0.0
        self.steps = 0

    def deviations(self, loss: float) -> float:
        """Add a finite loss. Return how many deviations it lies above the mean before it; 0 for the first losses."""
        above = 0.0
        if self.steps >= self.config.spike_window_steps:
            deviation = max(math.sqrt(self.variance), MIN_RELATIVE_DEVIATION * self.mean)
            above = (loss - self.mean) / deviation
            # A spike counts as the largest loss that is not one, so that it does not hide the next.
            loss = min(loss, self.mean + self.config.spike_deviations * deviation)
        self.steps += 1
        weight = max(1 / self.steps, 2 / (self.config.spike_window_steps + 1))
        difference = loss - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference**2)
        return above

    def state_dict(self) -> dict[str, float]:
        """Return mean, variance and count."""
        return {"mean": self.mean, "variance": self.variance, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Restore mean, variance and count."""
        self.mean, self.variance = state_dict["mean"], state_dict["variance"]
        self.steps = int(state_dict["steps"])


class Guards(Callback):
    """Check the losses and gradient norms of all steps, on log steps, before anything is logged or saved.

    The training module skips a non-finite update on the device. This callback decides what else to do about it on log
    steps, which wait for the device anyway. Log steps include the steps that save, so every checkpoint was checked.

    Raises GuardsError and RollbackRequest.

    Attributes:
        latest: Record of the last step that was read.
        skipped_updates: Updates of the run that were not applied.
        skipped_batches: Numbers of the batches that rollbacks skip.
    """

    def __init__(self, config: Config, interruption: Interruption, skipped_batches: list[int]) -> None:
        self.config = config
        self.guards = config.callbacks.guards
        self.interruption = interruption
        self.monitor = LossMonitor(self.guards)
        self.latest: StepRecord | None = None
        self.skipped_updates = 0
        self.skipped_batches = skipped_batches
        self._consecutive_skips = 0
        self._first_steps_checked = False
        self._skipped_first = False

    def state_dict(self) -> dict[str, Any]:
        """Return monitor and counts."""
        return {
            "monitor": self.monitor.state_dict(),
            "skipped_updates": self.skipped_updates,
            "consecutive_skips": self._consecutive_skips,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore monitor and counts."""
        self.monitor.load_state_dict(state_dict["monitor"])
        self.skipped_updates = state_dict["skipped_updates"]
        self._consecutive_skips = state_dict["consecutive_skips"]

    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Check all steps since the last check, on a log step or before a save."""
        if self.config.is_log_step(module.steps_done) or self.interruption.save_requested:
            records = module.pop_step_metrics()
            self.latest = records[-1]
            self._check(trainer, records)
            self._check_first_steps(module.first_steps, records)

    def _check(self, trainer: pl.Trainer, records: list[StepRecord]) -> None:
        nonfinite = [record for record in records if self._is_nonfinite(trainer, record)]
        spikes = [record for record in records if record.applied and self._is_spike(trainer, record)]
        if nonfinite and self.guards.non_finite == "stop":
            raise GuardsError(self._advice(f"found a non-finite update at step {nonfinite[0].step:,}"))
        offending = nonfinite if self.guards.non_finite == "rollback" else []
        offending += spikes if self.guards.loss_spike == "rollback" else []
        if offending:
            offending.sort()
            steps, first = data_module_of(trainer).training_steps, offending[0]
            found = f"a loss spike, {first.loss:.3f}," if first.applied else "a non-finite update"
            batches = [steps.batch_at(record.step - 1) for record in offending]
            raise RollbackRequest(batches, f"Found {found} at step {first.step:,}")

    def _is_nonfinite(self, trainer: pl.Trainer, record: StepRecord) -> bool:
        """Count and report an update that was not applied.

        Raises GuardsError after too many of them, and for an applied update whose gradient was zero.
        """
        if record.applied:
            if record.gradient_norm == 0 and record.loss > 0:
                raise GuardsError(
                    _nothing_is_trained(
                        f"the gradient of step {record.step:,} was exactly zero, at a loss of {record.loss:.3f}"
                    )
                )
            self._consecutive_skips = 0
            return False
        self.skipped_updates += 1
        self._consecutive_skips += 1
        if trainer.is_global_zero:
            log.warning(
                "Step %s: loss %s, gradient norm %s: the update was not applied",
                f"{record.step:,}", f"{record.loss:g}", f"{record.gradient_norm:g}",
            )  # fmt: skip
        if self._consecutive_skips > self.guards.max_consecutive and self.guards.non_finite == "skip":
            raise GuardsError(self._advice(f"found {self._consecutive_skips} consecutive non-finite updates"))
        return True

    def _is_spike(self, trainer: pl.Trainer, record: StepRecord) -> bool:
        """Add the loss of a step to the monitor, and report it if it is a spike."""
        mean = self.monitor.mean
        above = self.monitor.deviations(record.loss)
        if above <= self.guards.spike_deviations:
            return False
        if self.guards.loss_spike != "ignore" and trainer.is_global_zero:
            log.warning(
                "Step %s: its loss of %.3f is %.1f standard deviations above the running mean, %.3f",
                f"{record.step:,}", record.loss, above, mean,
            )  # fmt: skip
        return True

    def _check_first_steps(self, first_steps: FirstSteps, records: list[StepRecord]) -> None:
        """Raise GuardsError if the first steps of this session did not train every weight."""
        self._skipped_first |= any(not record.applied for record in records if record.step <= first_steps.last_step)
        if self._first_steps_checked or not first_steps.has_seen_enough:
            return
        self._first_steps_checked = True
        if not self._skipped_first and (fault := first_steps.fault()):
            raise GuardsError(_nothing_is_trained(fault))

    def _advice(self, problem: str) -> str:
        rates = " and ".join(OPTIMIZERS.get(self.config.optimizer.name).learning_rate_keys)
        return (
            f"{problem}; none was applied, and training has stopped. Lower {rates}, lengthen schedule.warmup_steps or "
            "set optimizer.clip_norm, and resume from the last checkpoint with "
            "'resume_allow_changed=[optimizer,schedule]' (or start again with resume=overwrite); "
            "callbacks.guards.non_finite=rollback skips the batch"
        )


def _nothing_is_trained(problem: str) -> str:
    return (
        f"{problem}: the model is not being trained, and training has stopped. Data cannot cause this; if "
        "trainer.compile is on, train with trainer.compile=false, or with another version of PyTorch (this is "
        f"{torch.__version__})"
    )
