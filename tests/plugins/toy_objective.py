"""An objective of another distribution: predict each token from the ones after it, measured by a score of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cucafera.config.fields import setting
from cucafera.config.registry import OBJECTIVES
from cucafera.config.schema import Config, ObjectiveConfig
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.objectives import MetricSpec, Objective


@dataclass
class ToyBackwardConfig(ObjectiveConfig):
    """Reading backwards."""

    name: str = setting("toy_backward", "Which objective.")
    scale: float = setting(1.0, "Factor of the loss.", above=0)


@OBJECTIVES.register
class ToyBackward(Objective):
    """Next-token prediction of the reversed windows."""

    name = "toy_backward"
    config = ToyBackwardConfig
    stage = "reading backwards"
    kind_of_data = "texts"
    chats = False
    metrics = (MetricSpec("hits", "share of hits", "of the tokens", "higher", ".4f", negligible=0.001),)
    primary = "hits"
    stop_id = DOCUMENT_START_ID

    def open_data(self, config: Config) -> Any:
        """Return the windows of documents, as for pretraining."""
        from cucafera.data.packed import open_documents

        return open_documents(config)

    def loss(self, settings: Any, model: Any, batch: Any, document_limit: int | None) -> Any:
        """Return the summed loss of the reversed windows."""
        return settings.scale * model(batch.targets.flip(1), batch.input_ids.flip(1))

    def units(self, batch: Any) -> Any:
        """Return the number of targets."""
        return (batch.input_ids >= 0).sum()

    def validation_metrics(self, settings: Any, tokenizer: Any, vocab_size: int) -> Any:
        """Return sums of hits and tokens."""
        import torch

        from cucafera.objectives._metrics import ValidationMetrics

        class Hits(ValidationMetrics):
            def __init__(self) -> None:
                super().__init__()
                self.add_state("correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
                self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

            def update(self, model: Any, batch: Any, document_limit: int | None) -> None:
                targets = batch.input_ids.flip(1)
                inputs = batch.targets.flip(1).clamp_min(0)
                self.correct += model.loss_and_accuracy(inputs, targets, None, None)[1]
                self.tokens += targets.numel()

            def compute(self) -> dict[str, torch.Tensor]:
                return {"hits": self.correct / self.tokens}

        return Hits()

    def prompt_ids(self, tokenizer: Any, prompt: str) -> list[int]:
        """Return the prompt."""
        return list(tokenizer.encode(prompt))

    def summary(self, metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Say in which direction the model reads."""
        return [("Direction", "backwards")]
