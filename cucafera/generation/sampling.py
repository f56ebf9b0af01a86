"""From logits to the next token.

B texts, V vocabulary
"""

import torch
from torch import Tensor

from cucafera.config import SPECIAL_TOKENS, SamplingConfig


def filtered_logits(logits: Tensor, seen: Tensor, sampling: SamplingConfig) -> Tensor:
    """Logits after penalty, temperature, top_k, top_p and min_p, in this order; what is filtered out is -inf.

    Args:
        logits: [B, V].
        seen: True for tokens that the text holds, [B, V]: their logits are penalized (Keskar et al., 2019, CTRL,
            section 4.1).
        sampling: Its temperature must be above zero.

    Returns:
        Logits [B, V] to draw from.
    """
    logits = _penalized(logits, seen, sampling.repetition_penalty) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if sampling.top_p < 1.0:
        # Nucleus sampling (Holtzman et al., 2019): the token that crosses top_p is still kept.
        ordered, indices = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        ordered = ordered.masked_fill(before >= sampling.top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(1, indices, ordered)
    if sampling.min_p > 0.0:
        # Nguyen et al., 2024: the bar rises with the confidence of the model.
        probabilities = logits.softmax(-1)
        too_low = probabilities < sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(too_low, -torch.inf)
    return logits


def _penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    if penalty == 1.0:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def next_tokens(logits: Tensor, seen: Tensor, sampling: SamplingConfig, generator: torch.Generator | None) -> Tensor:
    """The next token of each text, [B, 1], from logits [B, V] and the tokens seen [B, V]."""
    if sampling.temperature == 0:
        return _penalized(logits, seen, sampling.repetition_penalty).argmax(-1, keepdim=True)
    probabilities = filtered_logits(logits, seen, sampling).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)


class SeenTokens:
    """Which tokens each text holds, for the repetition penalty.

    Control tokens never count: otherwise every turn of a conversation would make it harder for the model to stop.

    Args:
        prompts: Token ids of each text.
        vocab_size: V.
        device: Where the logits are.
    """

    def __init__(self, prompts: list[list[int]], vocab_size: int, device: torch.device) -> None:
        self.mask = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        for row, prompt in zip(self.mask, prompts, strict=True):
            row[torch.tensor(prompt, dtype=torch.int64, device=device)] = True
        self.mask[:, : len(SPECIAL_TOKENS)] = False

    def add(self, tokens: Tensor) -> None:
        """Counts new tokens, [B, 1]."""
        self.mask.scatter_(1, tokens, True)
        self.mask[:, : len(SPECIAL_TOKENS)] = False
