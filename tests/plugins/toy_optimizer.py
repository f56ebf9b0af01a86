"""An optimizer of another distribution: SGD with momentum, whose kernel knows nothing of non-finite updates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cucafera.config.fields import setting
from cucafera.config.registry import OPTIMIZERS
from cucafera.config.schema import OptimizerConfig
from cucafera.optimizers import OptimizerSpec


@dataclass
class ToySGDConfig(OptimizerConfig):
    """SGD with momentum."""

    name: str = setting("toy_sgd", "Which optimizer.")
    momentum: float = setting(0.9, "Decay of the running mean of the gradient.", at_least=0, below=1)


@OPTIMIZERS.register
class ToySGD(OptimizerSpec):
    """SGD with momentum."""

    name = "toy_sgd"
    config = ToySGDConfig
    state_bytes_per_parameter = 4

    def build(self, model: Any, config: Any) -> Any:
        """Return the optimizer, with one parameter group."""
        import torch

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [{"name": "all", "params": trained}]
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)

    def describe(self, settings: Mapping[str, Any]) -> str:
        """Return the recipe in words."""
        return f"SGD, momentum {settings['momentum']:g}"
