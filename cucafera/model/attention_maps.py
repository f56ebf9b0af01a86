"""Attention probabilities of each head, which no attention kernel returns.

L layers, H heads, K key/value heads, T tokens, d head dim
"""

import torch
from torch import Tensor

from cucafera.model.transformer import Attention, Block, Decoder, rotate


@torch.no_grad()
def attention_probabilities(model: Decoder, input_ids: Tensor) -> Tensor:
    """Return softmax(queries @ keys.T / sqrt(d)) of every layer and head, for causal attention over one text.

    Args:
        model: The decoder.
        input_ids: [T] int64.

    Returns:
        fp32 [L, H, T, T]: the weight of each key (last dimension) for each query. Rows sum to 1, and keys after their
        query have weight 0.
    """
    cos, sin = model.cos[: len(input_ids)], model.sin[: len(input_ids)]
    x = model.embed_tokens(input_ids[None])
    maps = []
    for layer in model.layers:
        assert isinstance(layer, Block)
        maps.append(_layer_probabilities(layer.self_attn, layer.input_layernorm(x), cos, sin))
        x = layer(x, cos, sin, None, None)
    return torch.stack(maps)


def _layer_probabilities(attention: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[1, T, D] to [H, T, T]."""
    projected = (
        projection(x).unflatten(-1, (-1, attention.head_dim)) for projection in (attention.q_proj, attention.k_proj)
    )
    queries, keys = (rotate(heads, cos, sin)[0].transpose(0, 1).float() for heads in projected)
    keys = keys.repeat_interleave(len(queries) // len(keys), dim=0)
    scores = queries @ keys.transpose(1, 2) / attention.head_dim**0.5
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
    probabilities: Tensor = scores.masked_fill(later, -torch.inf).softmax(-1)
    return probabilities
