"""AdamW."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cucafera.config.fields import setting
from cucafera.config.registry import OPTIMIZERS
from cucafera.config.schema import OptimizerConfig
from cucafera.optimizers import OptimizerSpec, set_learning_rate

if TYPE_CHECKING:
    import torch

    from cucafera.model.transformer import Decoder


@dataclass
class AdamWConfig(OptimizerConfig):
    """AdamW."""

    name: str = "adamw"
    weight_decay: float = setting(
        1.0,
        "Decoupled decay of matrices per step, times the learning rate; a long run wants less, as a weight is "
        "forgotten within 1 / (lr * weight_decay) steps.",
        at_least=0,
    )
    embedding_lr: float | None = setting(
        None, "Peak learning rate of the embedding, which is tied with the head; null: the same as lr.", above=0
    )
    betas: list[float] = setting(
        [0.9, 0.95],
        "Decay of the running mean and of the running square of the gradient.",
        must_be=("two numbers in [0, 1)", lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas)),
    )
    eps: float = setting(1e-8, "Added to the root of the running square.", above=0)


@OPTIMIZERS.register
class AdamW(OptimizerSpec):
    """AdamW (Loshchilov & Hutter, 2017), in one fused kernel per parameter group."""

    name = "adamw"
    config = AdamWConfig
    state_bytes_per_parameter = 8
    reads_found_inf = True

    def build(self, model: "Decoder", config: AdamWConfig) -> "torch.optim.Optimizer":
        """Return the optimizer. The learning rate is set before each step, from the schedule."""
        import torch

        from cucafera.model.parameter_groups import parameter_groups

        embedding_ratio = 1.0 if config.embedding_lr is None else config.embedding_lr / config.lr
        groups = parameter_groups(model, config.weight_decay, embedding_ratio)
        first, second = config.betas
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), eps=config.eps, fused=True)
        set_learning_rate(optimizer, config.lr)
        return optimizer

    def describe(self, settings: Mapping[str, Any]) -> str:
        """Return the recipe in words."""
        embedding = settings.get("embedding_lr")
        rates = f"lr {settings['lr']:g}" + (f" (embedding {embedding:g})" if embedding else "")
        return f"AdamW, {rates}, weight decay {settings['weight_decay']:g}"
