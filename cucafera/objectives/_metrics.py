"""Accumulators of what validation measures, summed exactly over batches and devices."""

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from cucafera.data.windows import IGNORED

if TYPE_CHECKING:
    from cucafera.data.windows import Batch
    from cucafera.model.transformer import Decoder


class ValidationMetrics(Metric):
    """A torchmetrics Metric that is updated with the model and a micro-batch; `compute` gives values by name."""

    full_state_update = False

    @abstractmethod
    def update(self, model: "Decoder", batch: "Batch", document_limit: int | None) -> None:
        """Add the sums of one micro-batch."""

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """Return the measures by name, each a scalar."""


class NextTokenMetrics(ValidationMetrics):
    """Loss, perplexity, top-1 accuracy and bits per byte of the targets.

    bpb is the length of the code that the model gives to the held-out stream, in bits, over the UTF-8 bytes of its
    text (Gao et al., 2020, The Pile, section 3.1). Control tokens, such as the one that starts a document, cost bits
    and stand for no bytes: a model that cannot tell where a document ends pays for it.

    Args:
        token_bytes: UTF-8 bytes of each token of the tokenizer, [tokens].
        vocab_size: Rows of the model's embedding; ids beyond the tokenizer stand for no bytes.
    """

    token_bytes: Tensor
    nats: Tensor
    correct: Tensor
    tokens: Tensor
    text_bytes: Tensor

    def __init__(self, token_bytes: NDArray[np.int64], vocab_size: int) -> None:
        super().__init__()
        padded = torch.zeros(vocab_size, dtype=torch.int64)
        padded[: len(token_bytes)] = torch.from_numpy(token_bytes)
        self.token_bytes = padded  # no buffer: DDP would broadcast it in every forward pass
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("correct", "tokens", "text_bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, model: "Decoder", batch: "Batch", document_limit: int | None) -> None:
        """Add the sums of one micro-batch of windows, tensors [n, T]."""
        scores: Any = model.loss_and_accuracy(batch.input_ids, batch.targets, batch.documents, document_limit)
        valid = batch.targets != IGNORED
        self.nats += scores[0]
        self.correct += scores[1]
        self.tokens += valid.sum()
        self.token_bytes = self.token_bytes.to(valid.device)
        self.text_bytes += (self.token_bytes[batch.targets.clamp_min(0)] * valid).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return loss in nats per token, perplexity, top-1 accuracy and bits per byte."""
        loss = self.nats / self.tokens
        return {
            "loss": loss,
            "perplexity": loss.exp(),
            "accuracy": self.correct.double() / self.tokens,
            "bpb": self.nats / (math.log(2) * self.text_bytes),
        }
