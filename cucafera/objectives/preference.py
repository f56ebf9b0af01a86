"""Preference tuning: better and worse answers to the same prompt. The formulas stand in _preference_losses.py."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cucafera.config.fields import format_value
from cucafera.config.registry import OBJECTIVES, Judge
from cucafera.config.schema import Config, ObjectiveConfig
from cucafera.config.tokens import IM_END_ID
from cucafera.objectives import MetricSpec, Objective
from cucafera.objectives._embedded import embedded_problems
from cucafera.objectives._language import language_problems
from cucafera.objectives._preference_config import WITHOUT_REFERENCE, PreferenceConfig

if TYPE_CHECKING:
    from torch import Tensor

    from cucafera.data.run_data import RunData
    from cucafera.data.tokenizer import Tokenizer
    from cucafera.data.windows import Batch
    from cucafera.model.transformer import Decoder
    from cucafera.objectives._metrics import ValidationMetrics


CHARTS = {
    "Reward accuracy": ["reward_accuracy/val"],
    "Reward of better and worse answers": ["val/reward_chosen", "val/reward_rejected"],
    "Log-probability of better and worse answers, nats per token": ["val/chosen_logprob", "val/rejected_logprob"],
}


@OBJECTIVES.register
class PreferenceTuning(Objective):
    """The mean over pairs of a loss that the better answer lowers, and the worse one raises.

    The answer's tokens and the `<im_end>` after it are what is compared; the prompt is the same for both.
    """

    name = "preference"
    config = PreferenceConfig
    stage = "preference tuning"
    kind_of_data = "pairs of a better and a worse answer"
    chats = True
    metrics = (
        MetricSpec("loss", "validation loss", "per pair", negligible=0.005, format=".4f"),
        MetricSpec("reward_accuracy", "reward accuracy", direction="higher", format=".1%", negligible=0.005),
        MetricSpec("reward_margin", "reward margin", direction="higher", format=".4f"),
        MetricSpec("reward_chosen", "reward of better answers", direction="higher", format=".4f"),
        MetricSpec("reward_rejected", "reward of worse answers", format=".4f"),
        MetricSpec("chosen_logprob", "better answers", "nats per token", direction="higher"),
        MetricSpec("rejected_logprob", "worse answers", "nats per token"),
        MetricSpec("logprob_accuracy", "better answer is more probable per token", "", "higher", ".1%"),
    )
    primary = "reward_accuracy"
    watched = "chosen_logprob"
    charts = CHARTS
    loss_unit = "per pair"
    stop_id = IM_END_ID

    def problems(self, config: Config, judge: Judge) -> Iterator[str]:
        """A loss refuses settings that it would ignore, and pairs need a trained model and document masks."""
        yield from embedded_problems(config, judge, self.name, "pairs of answers")
        yield from language_problems(config, judge, self.name, has_answers=True)
        settings = config.objective
        if isinstance(settings, PreferenceConfig) and judge("objective"):
            for key, value, owner in (
                ("gamma", settings.gamma, "simpo"), ("label_smoothing", settings.label_smoothing, "robust"),
            ):  # fmt: skip
                if value and settings.loss != owner:
                    yield (
                        f"objective.{key} is {format_value(value)}; only the loss {owner} has it, and objective.loss "
                        f"is {settings.loss}"
                    )
            if settings.loss == "robust" and not settings.label_smoothing:
                yield (
                    "objective.loss is robust and objective.label_smoothing is 0, which is sigmoid; give the share of "
                    "the pairs that may be the wrong way round, such as objective.label_smoothing=0.1"
                )
        if judge("init_from") and config.init_from is None:
            yield (
                "preference tuning needs a model that answers: init_from=RUN, the folder or a checkpoint of a "
                "finetuned model"
            )
        if judge("data.document_masking") and not config.data.document_masking:
            yield "data.document_masking is false; the two answers of a pair must not see each other"

    def remedies(self, settings: ObjectiveConfig) -> list[str]:
        """A loss is held back by its reference, or by the better answers themselves."""
        assert isinstance(settings, PreferenceConfig)
        beta = [f"raise objective.beta ({settings.beta:g})"] if settings.has_reference else []
        if settings.loss == "orpo":
            beta = [f"lower objective.beta ({settings.beta:g})"]
        weight = 2 * settings.nll_weight or 0.1
        return [*beta, f"set objective.nll_weight={weight:g}"]

    def describe(self, settings: Mapping[str, Any]) -> str:
        """Return the loss and its settings."""
        values = {"beta": settings["beta"]}
        values |= {key: settings[key] for key in ("gamma", "label_smoothing", "nll_weight") if settings[key]}
        words = ", ".join(f"{key} {value:g}" for key, value in values.items())
        return f"{self.stage}, loss {settings['loss']}, {words}"

    def tags(self, settings: Mapping[str, Any]) -> list[str]:
        """Return dpo, or the name of a loss that has no reference."""
        return [settings["loss"] if settings["loss"] in WITHOUT_REFERENCE else "dpo"]

    def open_data(self, config: Config) -> "RunData[Any]":
        """Tokenize the pairs, and pack them into windows."""
        from cucafera.data.preferences import open_preferences

        return open_preferences(config)

    def loss(self, settings: ObjectiveConfig, model: "Decoder", batch: "Batch", document_limit: int | None) -> "Tensor":
        """Return the summed loss of the pairs, a scalar."""
        from cucafera.objectives._preference_losses import pairs_of, preference_losses

        assert isinstance(settings, PreferenceConfig)
        return preference_losses(settings, *pairs_of(model, batch, document_limit, settings.has_reference)).sum()

    def units(self, batch: "Batch") -> "Tensor":
        """Return the number of pairs."""
        from cucafera.objectives._preference_losses import target_counts

        return (target_counts(batch)[:, ::2] > 0).sum()

    def validation_metrics(
        self, settings: ObjectiveConfig, tokenizer: "Tokenizer", vocab_size: int
    ) -> "ValidationMetrics":
        """Return sums over pairs."""
        from cucafera.objectives._preference_losses import PreferenceMetrics

        assert isinstance(settings, PreferenceConfig)
        return PreferenceMetrics(settings)

    def cross_entropy(self, model: "Decoder", batch: "Batch", document_limit: int | None) -> "Tensor":
        """Return the summed cross-entropy of the targets, a scalar in nats."""
        return -model.target_logprobs(batch.input_ids, batch.targets, batch.documents, document_limit).sum()

    def needs_reference(self, settings: ObjectiveConfig) -> bool:
        """True unless the loss is simpo or orpo."""
        assert isinstance(settings, PreferenceConfig)
        return settings.has_reference

    def initial_problem(self, settings: ObjectiveConfig, chats: bool) -> str | None:
        """Say that a base model does not answer, unless the loss teaches the better answers too."""
        assert isinstance(settings, PreferenceConfig)
        if chats or settings.loss == "orpo" or settings.nll_weight:
            return None
        return (
            "it was trained on documents, and does not answer: finetune it first (+experiment=finetune), or teach the "
            "better answers too, with objective.loss=orpo"
        )

    def reference_logprobs(self, model: "Decoder", batch: "Batch", document_limit: int | None) -> "Tensor":
        """Return the log-probability of each answer, [n, D] float64 in nats."""
        from cucafera.objectives._preference_losses import document_logprobs

        return document_logprobs(model, batch, document_limit)[0]

    def prompt_ids(self, tokenizer: "Tokenizer", prompt: str) -> list[int]:
        """Return the prompt as the user's message, and the opening of the assistant's answer."""
        from cucafera.data.chatml import Message, render_prompt

        return render_prompt([Message("user", prompt)], tokenizer)
