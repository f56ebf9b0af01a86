"""Sampling: from logits to the next token.

B sequences, V vocabulary
"""

import torch
from torch import Tensor

from cucafera.config.schema import SamplingConfig
from cucafera.config.tokens import SPECIAL_TOKENS


def filtered_logits(logits: Tensor, present: Tensor, sampling: SamplingConfig) -> Tensor:
    """Return logits after repetition penalty, temperature, top_k, top_p and min_p, in this order.

    The order is that of transformers' logits processors, so that the same settings mean the same distribution.

    Args:
        logits: [B, V].
        present: True for tokens that the sequence contains, [B, V]: their logits are penalized (Keskar et al., 2019,
            CTRL, section 4.1).
        sampling: Its temperature must be above zero.

    Returns:
        Logits [B, V]; tokens that were filtered out have -inf.
    """
    logits = _penalized(logits, present, sampling.repetition_penalty) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if sampling.top_p < 1.0:
        # Nucleus sampling (Holtzman et al., 2019): the token that crosses top_p is still kept.
        descending, indices = logits.sort(dim=-1, descending=True)
        before = descending.softmax(-1).cumsum(-1) - descending.softmax(-1)
        descending = descending.masked_fill(before >= sampling.top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(1, indices, descending)
    if sampling.min_p > 0.0:
        # Nguyen et al., 2024: the threshold rises with the confidence of the model.
        probabilities = logits.softmax(-1)
        too_low = probabilities < sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(too_low, -torch.inf)
    return logits


def _penalized(logits: Tensor, present: Tensor, penalty: float) -> Tensor:
    if penalty == 1.0:
        return logits
    # Dividing a negative logit would make its token more probable, so negative ones are multiplied.
    return torch.where(present, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample_tokens(
    logits: Tensor, present: Tensor, sampling: SamplingConfig, generator: torch.Generator | None
) -> Tensor:
    """Sample the next token of each sequence; at temperature 0, take the most probable one (greedy decoding).

    Args:
        logits: [B, V].
        present: True for tokens that the sequence contains, [B, V].
        sampling: Sampling settings.
        generator: Random generator on the device of the logits; None: torch's global one.

    Returns:
        Token ids [B, 1].
    """
    if sampling.temperature == 0:
        return _penalized(logits, present, sampling.repetition_penalty).argmax(-1, keepdim=True)
    probabilities = filtered_logits(logits, present, sampling).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)


class TokenPresence:
    """The tokens that each sequence contains, for the repetition penalty.

    Control tokens are never marked: otherwise each turn of a conversation would make the end-of-turn token less
    probable.

    Args:
        prompts: Token ids of each sequence.
        vocab_size: V.
        device: Device of the logits.

    Attributes:
        mask: Bool [B, V].
    """

    def __init__(self, prompts: list[list[int]], vocab_size: int, device: torch.device) -> None:
        self.mask = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        for row, prompt in zip(self.mask, prompts, strict=True):
            row[torch.tensor(prompt, dtype=torch.int64, device=device)] = True
        self.mask[:, : len(SPECIAL_TOKENS)] = False

    def add(self, tokens: Tensor) -> None:
        """Mark new tokens, [B, 1]."""
        self.mask.scatter_(1, tokens, True)
        self.mask[:, : len(SPECIAL_TOKENS)] = False
