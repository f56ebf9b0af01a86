"""Guard against training that ruins the answers of a chat model."""

import logging
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from cucafera.config.registry import OPTIMIZERS
from cucafera.config.schema import Config, GuardsConfig
from cucafera.objectives import Objective
from cucafera.quantities import number_of
from cucafera.runs.folder import RunFolder
from cucafera.training.callbacks.base import Callback
from cucafera.training.callbacks.interruption import Interruption
from cucafera.training.callbacks.samples import Samples
from cucafera.training.callbacks.validation import Validation
from cucafera.training.module import LanguageModel

log = logging.getLogger(__name__)

SETTING = "callbacks.guards.answers"


class AnswersGuard(Callback):
    """After a validation, compare the answers with those before the first step, if the objective is one to watch.

    Preference tuning lowers the probability of both answers of a pair, and prefers long ones. A small model may so
    forget how to end an answer, or loop, while the reward accuracy still rises. Each such change is a warning, once:
    on the terminal, in the log, the history and the report of the run. With `stop`, training ends with a checkpoint.

    Attributes:
        warnings: What was found so far, as sentences.
    """

    def __init__(
        self, config: Config, folder: RunFolder, validation: Validation, samples: Samples, interruption: Interruption
    ) -> None:
        self.config = config
        self.guards = config.callbacks.guards
        self.folder = folder
        self.validation = validation
        self.samples = samples
        self.interruption = interruption
        self.warnings: list[str] = []
        self._found: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the warnings, and what they are about."""
        return {"warnings": self.warnings, "found": self._found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self.warnings, self._found = state_dict["warnings"], state_dict["found"]

    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Compare after a validation."""
        objective, step = module.objective, module.steps_done
        if objective.watched is None or self.guards.answers == "ignore" or self.validation.done_at(step) is None:
            return
        history, answers = self.validation.history, self.samples.answers
        changes = logprob_change(objective, history[0], history[-1], self.guards)
        if answers and answers[-1]["step"] == step:
            max_new_tokens = self.config.callbacks.sampling.max_new_tokens
            changes |= answer_changes(answers[0], answers[-1], max_new_tokens, self.guards)
        new = [text for kind, text in changes.items() if kind not in self._found]
        if new:
            self._warn(trainer, objective, step, new)
        self._found += [kind for kind in changes if kind not in self._found]
        if changes and self.guards.answers == "stop":
            self.interruption.stop_for_guard(trainer, step, f"{SETTING}=stop")

    def _warn(self, trainer: pl.Trainer, objective: Objective, step: int, changes: list[str]) -> None:
        self.warnings.append(f"after step {step:,}, {'; '.join(changes)}")
        if not trainer.is_global_zero:
            return
        rates = " and ".join(OPTIMIZERS.get(self.config.optimizer.name).learning_rate_keys)
        remedies = [
            f"lower {rates}",
            *objective.remedies(self.config.objective),
            "train for fewer steps",
            "see that the better answers of the data are short and end",
        ]
        log.warning(
            "THE ANSWERS BECOME WORSE: after step %s, compared with before training, %s. To change that, one of: %s. "
            "%s=stop ends training at such a change",
            f"{step:,}", "; ".join(changes), "; ".join(remedies), SETTING,
        )  # fmt: skip
        self.folder.note("answers became worse", step=step, changes=changes)


def logprob_change(
    objective: Objective, first: Mapping[str, float], last: Mapping[str, float], limits: GuardsConfig
) -> dict[str, str]:
    """Return in words that the watched metric has fallen too far, by its name; nothing if it has not.

    Args:
        objective: One with a watched metric.
        first, last: Validations, with the metrics in nats per token.
        limits: The limits.
    """
    assert objective.watched is not None
    metric = objective.metric(objective.watched)
    before, now = first[metric.name], last[metric.name]
    if before - now <= limits.max_logprob_fall:
        return {}
    values = f"{before:.2f} -> {now:.2f}"
    return {metric.name: f"{metric.label} are less probable by {before - now:.2f} nats per token ({values})"}


def answer_changes(
    first: Mapping[str, float], last: Mapping[str, float], max_new_tokens: int, limits: GuardsConfig
) -> dict[str, str]:
    """Return in words how sample answers became worse beyond the limits, by the name of the curve.

    A change that one answer alone could make is none: a few prompts are a noisy measure.

    Args:
        first, last: Records of `Samples.answers`.
        max_new_tokens: The length at which answers are cut.
        limits: The limits.
    """
    count = last["count"]
    changes = {}
    if round((first["stopped"] - last["stopped"]) * count) > max(limits.max_stopped_fall * count, 1):
        changes["stopped"] = f"{_counts(first, last, 'stopped')} sample answers end by themselves"
    if round((last["repeated_5gram"] - first["repeated_5gram"]) * count) > max(limits.max_repeated_growth * count, 1):
        changes["repeated_5gram"] = f"{_counts(first, last, 'repeated_5gram')} sample answers repeat five words"
    before, now = first["tokens"], last["tokens"]
    if now > limits.max_length_growth * before and now - before > max_new_tokens / count:
        changes["tokens"] = f"sample answers are longer ({before:.0f} -> {number_of(round(now), 'token')} on average)"
    return changes


def _counts(first: Mapping[str, float], last: Mapping[str, float], share: str) -> str:
    before, now = (round(record[share] * record["count"]) for record in (first, last))
    return f"{now} of {last['count']:.0f} instead of {before}"
