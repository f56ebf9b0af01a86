"""Continuing a text."""

import torch
from torch import Tensor

from cucafera.config import SamplingConfig
from cucafera.generation.cache import KeyValueCache
from cucafera.generation.sampling import next_tokens
from cucafera.model.transformer import Decoder


@torch.no_grad()
def generate(
    model: Decoder, prompt: Tensor, sampling: SamplingConfig, generator: torch.Generator, stop_ids: frozenset[int]
) -> Tensor:
    """Continues a prompt until a stop token, `max_new_tokens` or the end of the context, whichever comes first.

    Args:
        model: The decoder, on any device.
        prompt: Token ids [1, P]; shorter than the context.
        sampling: How the next token is drawn.
        generator: Source of randomness, on the model's device.
        stop_ids: Tokens that end the text; the one met is not returned.

    Returns:
        The new token ids, [N].
    """
    capacity = min(prompt.shape[1] + sampling.max_new_tokens, model.config.max_position_embeddings)
    weight = model.embed_tokens.weight
    cache = KeyValueCache(model.config, 1, capacity, weight.device, weight.dtype)
    tokens, new = prompt, prompt
    while tokens.shape[1] < capacity:
        # `forward` and not `model(...)`: a model compiled for windows would be compiled again for one token.
        hidden = model.forward(new, cache=cache)
        new = next_tokens(model.logits(hidden[:, -1]).float(), tokens, sampling, generator)
        if int(new) in stop_ids:
            break
        tokens = torch.cat([tokens, new], dim=1)
    return tokens[0, prompt.shape[1] :]
