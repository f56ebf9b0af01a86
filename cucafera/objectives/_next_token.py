"""Next-token prediction: what pretraining and finetuning share."""

from typing import TYPE_CHECKING

from cucafera.config.schema import ObjectiveConfig
from cucafera.objectives import MetricSpec, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from cucafera.data.tokenizer import Tokenizer
    from cucafera.data.windows import Batch
    from cucafera.model.transformer import Decoder
    from cucafera.objectives._metrics import ValidationMetrics

NEXT_TOKEN_METRICS = (
    MetricSpec("loss", "validation loss", "nats per token", negligible=0.01),
    MetricSpec("perplexity", "perplexity", format=".1f"),
    MetricSpec("accuracy", "top-1 accuracy", direction="higher", format=".1%"),
    MetricSpec("bpb", "validation bpb", "bits per byte", negligible=0.005),
)


class NextToken(Objective):
    """The sum of the cross-entropy, in nats, over all targets."""

    loss_unit = "nats per token"

    def loss(self, settings: ObjectiveConfig, model: "Decoder", batch: "Batch", document_limit: int | None) -> "Tensor":
        """Return the summed cross-entropy of the targets, a scalar in nats."""
        return self.cross_entropy(model, batch, document_limit)

    def units(self, batch: "Batch") -> "Tensor":
        """Return the number of targets."""
        from cucafera.data.windows import IGNORED

        return (batch.targets != IGNORED).sum()

    def validation_metrics(
        self, settings: ObjectiveConfig, tokenizer: "Tokenizer", vocab_size: int
    ) -> "ValidationMetrics":
        """Return sums of nats, correct tokens, tokens and bytes."""
        from cucafera.objectives._metrics import NextTokenMetrics

        return NextTokenMetrics(tokenizer.token_bytes(), vocab_size)
