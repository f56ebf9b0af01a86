"""Low-rank adapters (Hu et al., 2021, LoRA): y = x W^T + (alpha / r) (x A^T) B^T, where only A and B are trained.

I inputs, O outputs, r rank
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cucafera.config.schema import AdapterConfig
from cucafera.model.linear import Linear
from cucafera.model.transformer import Decoder


class LoRALinear(Linear):
    """A linear layer with a frozen weight and an adapter.

    `lora_A` [r, I] is initialized like nn.Linear and `lora_B` [O, r] to zero, so that the initial adapter is zero.
    """

    def __init__(self, linear: Linear, rank: int, alpha: float) -> None:
        with torch.device("meta"):  # no initialization of weights that are replaced in the next line
            super().__init__(linear.in_features, linear.out_features)
        self.weight = linear.weight
        self.weight.requires_grad_(False)
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_adapters(model: Decoder, config: AdapterConfig) -> None:
    """Freeze a decoder and add adapters to the linear layers that the configuration names; nothing for rank 0."""
    if not config.rank:
        return
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in config.modules and isinstance(child, Linear):
                setattr(module, name, LoRALinear(child, config.rank, config.alpha))


def merged_weights(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights with adapters merged.

    Args:
        state_dict: Weights, with or without adapters.
        config: Fields of the AdapterConfig used in training.
    """
    merged = {name: value for name, value in state_dict.items() if not name.endswith((".lora_A", ".lora_B"))}
    for name in state_dict:
        if name.endswith(".lora_A"):
            layer = name.removesuffix(".lora_A")
            merged[f"{layer}.weight"] = merged_weight(
                merged[f"{layer}.weight"],
                state_dict[name],
                state_dict[f"{layer}.lora_B"],
                config["alpha"] / config["rank"],
            )
    return merged


def merged_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Return W + scale * B A, computed in fp32, in the dtype of W.

    Args:
        weight: W [O, I].
        lora_a, lora_b: A [r, I] and B [O, r].
        scale: alpha / r.
    """
    return (weight.float() + scale * (lora_b.float() @ lora_a.float())).to(weight.dtype)
