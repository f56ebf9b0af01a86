"""Parameter groups and the optimizer."""

import torch
from torch import nn

from cucafera.config import OptimizerConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices, which are decayed, and vectors (the gains of the norms), which are not.

    A group's `name` labels its learning rate in the curves.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"name": "matrices", "params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"name": "vectors", "params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2017), in one fused kernel for each group of parameters.

    The learning rate is set before each step by the training module, from the schedule.
    """
    first, second = config.betas
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.lr, betas=(first, second), eps=config.eps, fused=True
    )
