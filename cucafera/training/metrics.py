"""What validation measures: loss, perplexity, accuracy and bits per byte, summed exactly over devices."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class LanguageModelingMetrics(Metric):
    """Sums of nats, tokens and bytes of the targets over any number of batches and devices.

    bpb is the length of the code that the model gives to the held-out stream, in bits, over the UTF-8 bytes of its
    text (Gao et al., 2020, The Pile, section 3.1). Control tokens, such as the one that begins a document, cost bits
    and stand for no bytes: a model that cannot tell where a document ends pays for it.
    """

    full_state_update = False
    nats: Tensor
    correct: Tensor
    tokens: Tensor
    text_bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("text_bytes", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, correct: Tensor, tokens: Tensor, text_bytes: Tensor) -> None:
        """Adds the sums of one batch; each is a scalar."""
        self.nats += nats
        self.correct += correct
        self.tokens += tokens
        self.text_bytes += text_bytes

    def compute(self) -> dict[str, Tensor]:
        """Mean loss in nats a token, its exponential, the share of tokens that were the likeliest, and bits a byte."""
        loss = self.nats / self.tokens
        return {
            "loss": loss,
            "perplexity": loss.exp(),
            "accuracy": self.correct.double() / self.tokens,
            "bpb": self.nats / (math.log(2) * self.text_bytes),
        }
