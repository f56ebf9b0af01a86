"""Parameter groups of an optimizer: which parameters are decayed, and whose learning rate depends on the width."""

from typing import Any

import torch

from cucafera.model.mup import learning_rate_ratio
from cucafera.model.transformer import Decoder

GROUP_NAMES = {
    (True, True): "matrices",
    (False, True): "vectors",
    (True, False): "block_matrices",
    (False, False): "final_gain",
}
"""By whether a group holds matrices, and whether their learning rate is the same at every width."""


def parameter_groups(model: Decoder, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, which are decayed, and vectors (the gains of the norms), which are not.

    Those whose learning rate is scaled by the width are groups of their own, with the ratio as `lr_ratio`. The decay is
    divided by it: AdamW multiplies it by the learning rate, and the product is to be the same at every width.
    A group's `name` labels its learning rate in the curves.
    """
    members: dict[tuple[bool, float], list[torch.nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = (parameter.ndim >= 2, learning_rate_ratio(name, model.config))
            members.setdefault(kind, []).append(parameter)
    groups: list[dict[str, Any]] = []
    for (are_matrices, ratio), parameters in members.items():
        decay = weight_decay / ratio if are_matrices else 0.0
        groups.append({"name": GROUP_NAMES[are_matrices, ratio == 1.0], "params": parameters, "weight_decay": decay})
        if ratio != 1.0:
            groups[-1]["lr_ratio"] = ratio
    return groups
