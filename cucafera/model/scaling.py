"""Scaling by width: a learning rate that was found on a narrow model holds on a wide one.

The maximal update parametrization for Adam with a tied head (Yang et al., 2022, Tensor Programs V, table 8) multiplies
what some parameters give in the forward pass. Adam does not see the scale of a gradient, so a multiplier c of a
parameter is the same as c times its initial value and c times its learning rate (ibid., appendix J). Here every
multiplier is folded in that way, and the model is a plain Llama at every moment.

    m  hidden_size / base_hidden_size

    parameter                             initial value   learning rate
    embedding, tied with the head         1               1
    matrices of the blocks                1 / sqrt(m)     1 / m
    gain of the final norm                1 / m           1 / m           the multiplier 1 / m of the logits
    other gains, adapters                 1               1

Attention's logits are divided by the root of the head width, where the paper divides by the width itself: that is the
same as long as heads of one width grow in number.
"""

from cucafera.config import ADAPTED_MODULES, ModelConfig

FINAL_GAIN = "norm.weight"
BLOCK_MATRICES = tuple(f".{name}.weight" for name in ADAPTED_MODULES)


def width_ratio(config: ModelConfig) -> float:
    """m: how many times wider than the base; 1 without one."""
    return 1.0 if config.base_hidden_size is None else config.hidden_size / config.base_hidden_size


def initial_scale(name: str, config: ModelConfig) -> float:
    """What the initial value of a parameter, N(0, initializer_range) or a gain of 1, is multiplied by.

    Args:
        name: Its name in the Decoder.
        config: The model.
    """
    if name == FINAL_GAIN:
        return 1.0 / width_ratio(config)
    return width_ratio(config) ** -0.5 if name.endswith(BLOCK_MATRICES) else 1.0


def learning_rate_ratio(name: str, config: ModelConfig) -> float:
    """The learning rate of a parameter as a fraction of that of the embedding.

    Args:
        name: Its name in the Decoder.
        config: The model.
    """
    return 1.0 / width_ratio(config) if name == FINAL_GAIN or name.endswith(BLOCK_MATRICES) else 1.0
