"""Parameter groups of an optimizer: which parameters are decayed, and whose learning rate differs."""

from typing import Any

import torch

from cucafera.model.mup import BLOCK_MATRICES, EMBEDDING, FINAL_GAIN, learning_rate_ratio
from cucafera.model.transformer import Decoder

KINDS = ("embedding", "block_matrices", "adapters", "gains", "final_gain")
"""Kinds of parameters, in the order of their groups. `adapters` are low-rank ones; `gains` are those of the norms in
the blocks. A group has the name of its kind, which labels its learning rate in the curves."""
MATRICES = frozenset({"embedding", "block_matrices", "adapters"})


def trained_parameters(model: Decoder) -> dict[str, dict[str, torch.nn.Parameter]]:
    """Return the parameters that are trained, by kind and name; kinds without any are left out."""
    by_kind: dict[str, dict[str, torch.nn.Parameter]] = {kind: {} for kind in KINDS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_kind[_kind(name)][name] = parameter
    return {kind: parameters for kind, parameters in by_kind.items() if parameters}


def parameter_groups(model: Decoder, weight_decay: float, embedding_ratio: float = 1.0) -> list[dict[str, Any]]:
    """Return a group per kind of parameters. Matrices are decayed, gains are not.

    Where a learning rate differs from the scheduled one, the group has the ratio as `lr_ratio`, and its decay is
    divided by it: AdamW multiplies decay and learning rate, and the product is to be the same for all matrices, at
    every width.

    Args:
        model: The decoder.
        weight_decay: Of the matrices.
        embedding_ratio: Learning rate of the embedding as a fraction of the scheduled one.
    """
    groups: list[dict[str, Any]] = []
    for kind, parameters in trained_parameters(model).items():
        ratio = learning_rate_ratio(next(iter(parameters)), model.config)  # the same for all of a kind
        if kind == "embedding":
            ratio *= embedding_ratio
        decay = weight_decay / ratio if kind in MATRICES else 0.0
        groups.append({"name": kind, "params": list(parameters.values()), "weight_decay": decay})
        if ratio != 1.0:
            groups[-1]["lr_ratio"] = ratio
    return groups


def _kind(name: str) -> str:
    if name == EMBEDDING:
        return "embedding"
    if name == FINAL_GAIN:
        return "final_gain"
    if name.endswith(BLOCK_MATRICES):
        return "block_matrices"
    return "adapters" if ".lora_" in name else "gains"
