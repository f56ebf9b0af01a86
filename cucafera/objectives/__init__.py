"""Objectives: one module per choice of `objective=NAME`, registered by name.

An objective owns what is learned from the data: how sources become windows, the loss as a sum and the number of units
that it is a sum over, what validation measures and which measure is the one to compare by, and how a prompt is framed.
Training, validation, samples, reports, sweeps and the model card ask it. To add one, write a module with an `Objective`
and decorate it with `@OBJECTIVES.register`; nothing else changes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cucafera.config.registry import OBJECTIVES, Judge
from cucafera.config.schema import Config, ObjectiveConfig
from cucafera.markup import markdown, markdown_lines

if TYPE_CHECKING:
    from torch import Tensor

    from cucafera.data.run_data import RunData
    from cucafera.data.tokenizer import Tokenizer
    from cucafera.data.windows import Batch
    from cucafera.model.transformer import Decoder
    from cucafera.objectives._metrics import ValidationMetrics


class MetricSpec(NamedTuple):
    """One measure of a validation.

    Attributes:
        name: Its key in metrics.json; `Objective.curve` gives the name of its curve.
        label: Its name in a sentence.
        unit: For reports; empty if the label says it.
        direction: `lower` or `higher`: which values are better.
        format: Of a value in a report, as for `format`.
        negligible: A difference too small to matter when runs are compared.
    """

    name: str
    label: str
    unit: str = ""
    direction: str = "lower"
    format: str = ".3f"
    negligible: float = 0.0

    def better(self, value: float, other: float) -> bool:
        """True if a value is better than another."""
        return value < other if self.direction == "lower" else value > other

    def best(self, values: Sequence[float]) -> float:
        """The best of some values."""
        return min(values) if self.direction == "lower" else max(values)

    def cost(self, value: float) -> float:
        """The value, negated if higher is better: what a search minimizes."""
        return value if self.direction == "lower" else -value

    @property
    def label_with_unit(self) -> str:
        """The label, and the unit in brackets if there is one."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def text(self, value: float) -> str:
        """A value with its unit."""
        return f"{value:{self.format}} {self.unit}".rstrip()


class Objective(ABC):
    """One choice of objective.

    Attributes:
        name: The choice in the configuration.
        config: Dataclass of its settings.
        stage: Its part in the making of a model, for the model card.
        kind_of_data: Plural noun for what it learns from, in the same place.
        chats: True if the trained model answers messages framed in ChatML; False if it continues text.
        metrics: What validation measures, in the order of reports. Training curves and guards are about the loss, which
            is not one of them unless it is named here.
        primary: Name of the metric to compare runs and checkpoints by.
        watched: Name of a metric in nats per token. If there is one, training may ruin a model that answered well: its
            fall, and what becomes of the sample answers, is compared with the state before the first step
            (`AnswersGuard`).
        charts: Further charts of the dashboard: titles, and the names of the curves in each.
        loss_unit: Unit of the training loss, for reports.
        stop_id: The end-of-sequence token, for other programs.
    """

    name: str
    config: type[ObjectiveConfig] = ObjectiveConfig
    stage: str
    kind_of_data: str
    chats: bool
    metrics: tuple[MetricSpec, ...]
    primary: str
    watched: str | None = None
    charts: Mapping[str, list[str]] = {}
    loss_unit: str = ""
    stop_id: int

    def problems(self, config: Config, judge: Judge) -> Iterator[str]:
        """Yield a sentence for each combination of values that the objective cannot work with."""
        yield from ()

    @abstractmethod
    def open_data(self, config: Config) -> "RunData[Any]":
        """Return the run's tokenizer and windows; makes and keeps what is not prepared yet.

        Raises:
            UserError: The data cannot be read, or is too little for one window.
        """

    @abstractmethod
    def loss(self, settings: ObjectiveConfig, model: "Decoder", batch: "Batch", document_limit: int | None) -> "Tensor":
        """Return the loss of a micro-batch: a scalar, summed over its units.

        Args:
            settings: Of the objective, in the run.
            model: The decoder, compiled if it is to be; called by its methods.
            batch: Windows of one forward pass.
            document_limit: As for `Decoder.forward`.
        """

    @abstractmethod
    def units(self, batch: "Batch") -> "Tensor":
        """Return the number of units of a batch, a scalar integer: what the step's loss is divided by."""

    @abstractmethod
    def validation_metrics(
        self, settings: ObjectiveConfig, tokenizer: "Tokenizer", vocab_size: int
    ) -> "ValidationMetrics":
        """Return an accumulator of what validation measures; its `compute` has the names of `metrics`."""

    def cross_entropy(self, model: "Decoder", batch: "Batch", document_limit: int | None) -> "Tensor":
        """Return the cross-entropy summed over the targets, in nats, by the part of the model that `loss` compiles.

        The gradients of a compiled model are checked with it.
        """
        summed: Tensor = model(batch.input_ids, batch.targets, batch.documents, document_limit=document_limit)
        return summed

    def needs_reference(self, settings: ObjectiveConfig) -> bool:
        """True if the loss compares log-probabilities with those of the initial weights (`Batch.reference_logprobs`).

        They are computed once, by `reference_logprobs`, before the first step.
        """
        return False

    def initial_problem(self, settings: ObjectiveConfig, chats: bool) -> str | None:
        """Return why the weights of init_from are probably not what the run needs; None if they are.

        Args:
            settings: Of the objective.
            chats: True if the weights were trained on conversations.
        """
        return None

    def reference_logprobs(self, model: "Decoder", batch: "Batch", document_limit: int | None) -> "Tensor":
        """Return the log-probability of the targets of each document, [n, D] float64, without gradients."""
        raise NotImplementedError

    @abstractmethod
    def prompt_ids(self, tokenizer: "Tokenizer", prompt: str) -> list[int]:
        """Return the tokens that stand before what the model writes in answer to a prompt."""

    def metric(self, name: str) -> MetricSpec:
        """The metric of a name."""
        return next(metric for metric in self.metrics if metric.name == name)

    @property
    def comparison_metrics(self) -> list[str]:
        """Names of the metrics to compare runs by: the validation loss, if there is one, and the primary metric."""
        return [metric.name for metric in self.metrics if metric.name in ("loss", self.primary)]

    def curve(self, name: str) -> str:
        """Name of a metric's curve. TensorBoard sorts curves: those to compare runs by stand before all others."""
        return f"{name}/val" if name in self.comparison_metrics else f"val/{name}"

    @property
    def primary_metric(self) -> MetricSpec:
        """The metric to compare runs and checkpoints by."""
        return self.metric(self.primary)

    def remedies(self, settings: ObjectiveConfig) -> list[str]:
        """Return changes of the configuration, as imperatives, against answers that get worse in training."""
        return []

    def describe(self, settings: Mapping[str, Any]) -> str:
        """Return the stage in words, with the settings that matter, for the model card."""
        return self.stage

    def tags(self, settings: Mapping[str, Any]) -> list[str]:
        """Return tags of the Hugging Face hub for a model of this stage."""
        return []

    def sample_markdown(self, prompt: str, continuation: str) -> str:
        """Return a prompt in bold, and what the model wrote, in Markdown: of these texts nothing is interpreted."""
        bold = "\n\n".join(f"**{markdown(part)}**" for part in prompt.split("\n\n") if part.strip())
        return bold + ("\n\n" if self.chats else "") + markdown_lines(continuation)

    def sample_text(self, prompt: str, continuation: str) -> list[str]:
        """Return the lines of a prompt and what the model wrote, for the terminal."""
        text = f"> {prompt}\n{continuation}" if self.chats else f"«{prompt}{continuation}»"
        return text.split("\n")

    def summary(self, metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return lines of the report that only this objective has: label and value, from a run's metrics.json."""
        return []


def objective_of(config: Config | Mapping[str, Any]) -> Objective:
    """Return the objective of a run.

    Args:
        config: Its configuration, or that as nested dictionaries.

    Raises:
        UserError: It is not registered here.
    """
    name = config.objective.name if isinstance(config, Config) else config["objective"]["name"]
    objective: Objective = OBJECTIVES.get(name)
    return objective
