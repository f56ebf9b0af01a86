"""Gradient norms and activation scales of each layer, which show exploding and vanishing values.

T time, D hidden, L layers
"""

import torch
from torch import Tensor, nn

from cucafera.model.attention import dense_mask
from cucafera.model.transformer import Decoder, positions_within

EMBEDDING = "embedding"
"""Name of the embedding among the names of layers."""


def layer_names(model: Decoder) -> list[str]:
    """Return `embedding` and the number of each layer from 00 on, as in the names of weights."""
    return [EMBEDDING, *(f"{number:02}" for number in range(len(model.layers)))]


def gradient_norms(model: Decoder) -> dict[str, Tensor]:
    """Return the norm of the gradient of the embedding, which is the head too, and of each layer.

    Returns:
        A scalar per name of `layer_names`, on the device, without waiting for it; layers that are not trained are
        missing.
    """
    norms = {}
    for name, layer in zip(layer_names(model), [model.embed_tokens, *model.layers], strict=True):
        gradients = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
        if gradients:
            norms[name] = nn.utils.get_total_norm(gradients)
    return norms


@torch.no_grad()
def activation_rms(model: Decoder, input_ids: Tensor, documents: Tensor | None) -> dict[str, Tensor]:
    """Return the root mean square of the residual stream after the embedding and after each layer.

    The layers are called one by one, also where the model is compiled, and with a dense mask, because flex attention
    would be compiled for this alone.

    Args:
        model: The decoder.
        input_ids: [B, T] int32 or int64.
        documents: Document number of each token, [B, T] int32, or None; see `Decoder.forward`.

    Returns:
        An fp32 scalar per name of `layer_names`, on the device.
    """
    positions = slice(input_ids.shape[1]) if documents is None else positions_within(documents)
    cos, sin = model.cos[positions], model.sin[positions]
    mask = None if documents is None else dense_mask(documents)
    x = model.embed_tokens(input_ids)
    scales = [_root_mean_square(x)]
    for layer in model.layers:
        x = layer(x, cos, sin, mask, None)
        scales.append(_root_mean_square(x))
    return dict(zip(layer_names(model), scales, strict=True))


def _root_mean_square(x: Tensor) -> Tensor:
    return x.float().square().mean().sqrt()
