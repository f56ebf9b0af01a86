"""Optimizers: one module per choice of `optimizer=NAME`, registered by name.

To add one, write a module with a dataclass of its settings and an `OptimizerSpec`, and decorate the latter with
`@OPTIMIZERS.register`. Memory formula, disk estimate, model card, curves and guards ask the spec; nothing else changes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from cucafera.config.registry import OPTIMIZERS, Judge
from cucafera.config.schema import Config, OptimizerConfig
from cucafera.model.flops import trained_parameter_count

if TYPE_CHECKING:
    import torch

    from cucafera.model.transformer import Decoder


class OptimizerSpec(ABC):
    """One choice of optimizer.

    Attributes:
        name: The choice in the configuration.
        config: Dataclass of its settings.
        learning_rates: Its settings that are peak learning rates.
        state_bytes_per_parameter: Bytes of state for each trained fp32 parameter, without weight and gradient.
        reads_found_inf: True if `step` of the built optimizer leaves weights and state untouched, on the device, where
            its attribute `found_inf` (a tensor) is 1, as the fused kernels of PyTorch do. Where it does not, training
            waits for the device before every step and leaves the step out itself.
    """

    name: str
    config: type[OptimizerConfig] = OptimizerConfig
    learning_rates: tuple[str, ...] = ("lr",)
    state_bytes_per_parameter: int
    reads_found_inf: bool = False

    @property
    def learning_rate_keys(self) -> list[str]:
        """The dotted keys of its peak learning rates."""
        return [f"optimizer.{name}" for name in self.learning_rates]

    def problems(self, config: Config, judge: Judge) -> Iterator[str]:
        """Yield a sentence for each value that the optimizer cannot work with."""
        yield from ()

    def state_bytes(self, config: Config) -> int:
        """Return the bytes of state for all trained parameters of a run."""
        return self.state_bytes_per_parameter * trained_parameter_count(config.model, config.adapter)

    @abstractmethod
    def build(self, model: "Decoder", config: Any) -> "torch.optim.Optimizer":
        """Return the optimizer over the trainable parameters of a model.

        Each parameter group has a `name`, which labels its learning rate in the curves, and may have an `lr_ratio`,
        by which the scheduled learning rate is multiplied.
        """

    def describe(self, settings: Mapping[str, Any]) -> str:
        """Return the recipe in words, for the model card, from the settings as plain values."""
        return f"{self.name}, lr {settings['lr']:g}"


def set_learning_rate(optimizer: "torch.optim.Optimizer", learning_rate: float) -> None:
    """Set the learning rate of each group: the scheduled one times the group's `lr_ratio`, if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_ratio", 1.0)


def build_optimizer(model: "Decoder", config: OptimizerConfig) -> "torch.optim.Optimizer":
    """Return the configured optimizer over the trainable parameters of a model."""
    spec: OptimizerSpec = OPTIMIZERS.get(config.name)
    return spec.build(model, config)
