"""Muon for the matrices of the blocks, and AdamW for everything else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cucafera.config.fields import setting
from cucafera.config.registry import OPTIMIZERS
from cucafera.config.schema import Config, OptimizerConfig
from cucafera.model.flops import block_matrix_parameter_count, layer_shapes
from cucafera.optimizers import OptimizerSpec, set_learning_rate

if TYPE_CHECKING:
    import torch

    from cucafera.model.transformer import Decoder


@dataclass
class MuonConfig(OptimizerConfig):
    """Muon for the matrices of the blocks; AdamW for the embedding, the gains, and adapters.

    A learning rate of Muon is the spectral norm of an update, up to sqrt(outputs / inputs): it is far above those of
    AdamW, and holds at every width.
    """

    name: str = "muon"
    lr: float = setting(4e-3, "Peak learning rate of AdamW: embedding, gains, adapters.", above=0)
    matrix_lr: float = setting(0.02, "Peak learning rate of Muon: the matrices of the blocks.", above=0)
    weight_decay: float = setting(
        0.1, "AdamW: decay of adapters per step, times lr; embedding and gains are not decayed.", at_least=0
    )
    matrix_weight_decay: float = setting(
        0.05, "Muon: decoupled decay of the blocks' matrices per step, times matrix_lr.", at_least=0
    )
    cautious: bool = setting(True, "Muon: decay a weight only in steps whose update brings it closer to zero, too.")
    momentum: float = setting(0.95, "Muon: decay of the running mean of the gradient.", at_least=0, below=1)
    row_normalization: bool = setting(True, "Muon: divide each row of an update by its running size (NorMuon).")
    betas: list[float] = setting(
        [0.9, 0.95],
        "AdamW: decay of the running mean and of the running square of the gradient.",
        must_be=("two numbers in [0, 1)", lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas)),
    )
    eps: float = setting(
        1e-10, "AdamW: added to the root of the running square; gradients of rare tokens are as small as 1e-8.", above=0
    )


@OPTIMIZERS.register
class Muon(OptimizerSpec):
    """Muon (Jordan et al., 2024) with AdamW for what is no matrix of a block, as one optimizer.

    One optimizer has one state in a checkpoint, and one guard against non-finite updates.
    """

    name = "muon"
    config = MuonConfig
    learning_rates = ("lr", "matrix_lr")
    state_bytes_per_parameter = 8
    reads_found_inf = True

    def state_bytes(self, config: Config) -> int:
        """Return the bytes of state: one momentum for the matrices of the blocks, two moments for the rest."""
        total = super().state_bytes(config)
        if config.adapter.rank:
            return total
        rows = config.model.num_hidden_layers * sum(outputs for outputs, _ in layer_shapes(config.model).values())
        row_bytes = 4 * rows if getattr(config.optimizer, "row_normalization", False) else 0
        return total - 4 * block_matrix_parameter_count(config.model) + row_bytes

    def build(self, model: "Decoder", config: MuonConfig) -> "torch.optim.Optimizer":
        """Return the optimizer. The learning rates are set before each step, from the schedule."""
        from cucafera.model.parameter_groups import parameter_groups
        from cucafera.optimizers._muon_with_adamw import MuonWithAdamW

        groups = parameter_groups(model, config.weight_decay)
        for group in groups:
            if group["name"] == "block_matrices":
                group |= {
                    "lr_ratio": config.matrix_lr / config.lr,
                    "weight_decay": config.matrix_weight_decay,
                    "momentum": config.momentum,
                    "cautious": config.cautious,
                    "row_normalization": config.row_normalization,
                }
            elif group["name"] == "embedding":
                group["weight_decay"] = 0.0
        first, second = config.betas
        optimizer = MuonWithAdamW(groups, lr=config.lr, betas=(first, second), eps=config.eps)
        set_learning_rate(optimizer, config.lr)
        return optimizer

    def describe(self, settings: Mapping[str, Any]) -> str:
        """Return the recipe in words."""
        return (
            f"Muon, lr {settings['matrix_lr']:g}, {'cautious ' if settings['cautious'] else ''}weight decay "
            f"{settings['matrix_weight_decay']:g}; AdamW for embedding and gains, lr {settings['lr']:g}"
        )
