"""From logits to the next token.

B texts, V vocabulary, S tokens so far
"""

import torch
from torch import Tensor

from cucafera.config import SamplingConfig


def filtered_logits(logits: Tensor, seen: Tensor, sampling: SamplingConfig) -> Tensor:
    """Logits after penalty, temperature, top_k and top_p, in this order; what is filtered out is -inf.

    Args:
        logits: [B, V].
        seen: Token ids so far, [B, S]: their logits are penalized (Keskar et al., 2019, CTRL, section 4.1).
        sampling: Its temperature must be above zero.

    Returns:
        Logits [B, V] to draw from.
    """
    if sampling.repetition_penalty != 1.0:
        of_seen = logits.gather(1, seen)
        penalty = sampling.repetition_penalty
        logits = logits.scatter(1, seen, torch.where(of_seen > 0, of_seen / penalty, of_seen * penalty))
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if sampling.top_p < 1.0:
        # Nucleus sampling (Holtzman et al., 2019): the token that crosses top_p is still kept.
        ordered, indices = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        ordered = ordered.masked_fill(before >= sampling.top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(1, indices, ordered)
    return logits


def next_tokens(logits: Tensor, seen: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> Tensor:
    """The next token of each text, [B, 1], from logits [B, V] and the tokens so far [B, S]."""
    if sampling.temperature == 0:
        greedy = SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=sampling.repetition_penalty)
        return filtered_logits(logits, seen, greedy).argmax(-1, keepdim=True)
    probabilities = filtered_logits(logits, seen, sampling).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)
