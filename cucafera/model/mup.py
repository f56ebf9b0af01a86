"""muP: scaling by width, so that a learning rate found on a narrow model holds on a wide one.

The maximal update parametrization for Adam with a tied head (Yang et al., 2022, Tensor Programs V, table 8) multiplies
the output of some parameters in the forward pass. Adam does not depend on the scale of a gradient, so a multiplier c
of a parameter is equivalent to c times its initial value and c times its learning rate (ibid., appendix J). Every
multiplier is folded in that way, and the model stays a plain Llama.

    m  hidden_size / base_hidden_size

    parameter                             initial value   learning rate
    embedding, tied with the head         1               1
    matrices of the blocks                1 / sqrt(m)     1 / m
    gain of the final norm                1 / m           1 / m           the multiplier 1 / m of the logits
    other gains, adapters                 1               1

Attention logits are divided by the square root of the head dim, where the paper divides by the head dim: that is
equivalent as long as the head dim is constant and the number of heads grows.

The table is for AdamW. Muon's update of a matrix has a spectral norm that is its learning rate times
sqrt(max(1, outputs / inputs)), which changes what a layer computes equally at every width (Yang et al., 2023, A
Spectral Condition for Feature Learning): matrices that it trains have no 1 / m.
"""

from cucafera.config.schema import ADAPTED_MODULES, ModelConfig

EMBEDDING = "embed_tokens.weight"
FINAL_GAIN = "norm.weight"
BLOCK_MATRICES = tuple(f".{name}.weight" for name in ADAPTED_MODULES)


def width_ratio(config: ModelConfig) -> float:
    """Return m, or 1 without a base."""
    return 1.0 if config.base_hidden_size is None else config.hidden_size / config.base_hidden_size


def initial_scale(name: str, config: ModelConfig) -> float:
    """Return the factor of a parameter's initial value, which is N(0, initializer_range) or a gain of 1.

    Args:
        name: Its name in the Decoder.
        config: The model.
    """
    if name == FINAL_GAIN:
        return 1.0 / width_ratio(config)
    return width_ratio(config) ** -0.5 if name.endswith(BLOCK_MATRICES) else 1.0


def learning_rate_ratio(name: str, config: ModelConfig) -> float:
    """Return the learning rate of a parameter that AdamW trains as a fraction of that of the embedding.

    Args:
        name: Its name in the Decoder.
        config: The model.
    """
    return 1.0 / width_ratio(config) if name == FINAL_GAIN or name.endswith(BLOCK_MATRICES) else 1.0
