"""Settings of preference tuning."""

from dataclasses import dataclass

from cucafera.config.fields import setting
from cucafera.config.schema import ObjectiveConfig

LOSSES = ("sigmoid", "robust", "ipo", "apo_zero", "simpo", "orpo", "sigmoid_norm")
WITHOUT_REFERENCE = ("simpo", "orpo")
PER_TOKEN = ("ipo", "simpo", "orpo", "sigmoid_norm")


@dataclass
class PreferenceConfig(ObjectiveConfig):
    """Preference tuning."""

    name: str = setting("preference", "The objective: chosen by objective=NAME.")
    loss: str = setting(
        "sigmoid",
        "sigmoid: DPO; robust: DPO for wrong labels; ipo, apo_zero; sigmoid_norm: DPO per token; simpo and orpo have "
        "no reference.",
        choices=LOSSES,
    )
    beta: float = setting(
        0.1, "Strength of the loss: a small beta lets the model move far; for orpo, weight of the odds ratio.", above=0
    )
    gamma: float = setting(0.0, "simpo: margin that the better answer is to have, in units of the reward.", at_least=0)
    label_smoothing: float = setting(
        0.0, "robust: share of the pairs whose better answer is really the worse one.", at_least=0, below=0.5
    )
    nll_weight: float = setting(
        0.0, "Weight of the cross-entropy per token of the better answers, added to the loss.", at_least=0
    )

    @property
    def has_reference(self) -> bool:
        """True if the loss compares with the model before preference tuning."""
        return self.loss not in WITHOUT_REFERENCE

    @property
    def is_per_token(self) -> bool:
        """True if the loss takes log-probabilities per token."""
        return self.loss in PER_TOKEN
