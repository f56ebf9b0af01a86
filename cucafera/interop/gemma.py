"""Our network in the form of Gemma.

Gemma computes a GeGLU model of ours with D = hidden_size, but for two factors:

    embedding    It multiplies embeddings by sqrt(D), so the embedding is divided by it.
    final norm   The embedding is the head too, so the weight before the head, of the final norm, is multiplied by it.

Two notations of a norm's weight w exist: GGUF holds the factor w, and transformers' GemmaForCausalLM holds w - 1.
"""

import math

from torch import Tensor

EMBEDDING, FINAL_NORM = "embed_tokens.weight", "norm.weight"
"""Names in the Decoder."""


def scale_for_gemma(name: str, value: Tensor, hidden_size: int) -> Tensor:
    """Return a weight of a Decoder with the factor that Gemma's graph applies removed; norms as factors."""
    root = math.sqrt(hidden_size)
    return value / root if name == EMBEDDING else value * root if name == FINAL_NORM else value


def unscale_from_gemma(name: str, value: Tensor, hidden_size: int) -> Tensor:
    """Invert `scale_for_gemma`."""
    root = math.sqrt(hidden_size)
    return value * root if name == EMBEDDING else value / root if name == FINAL_NORM else value


def to_transformers_gemma(name: str, value: Tensor, hidden_size: int) -> Tensor:
    """Return a weight of a Decoder as transformers' GemmaForCausalLM has it: norms minus 1."""
    scaled = scale_for_gemma(name, value, hidden_size)
    return scaled - 1 if value.ndim == 1 else scaled


def from_transformers_gemma(name: str, value: Tensor, hidden_size: int) -> Tensor:
    """Invert `to_transformers_gemma`."""
    return unscale_from_gemma(name, value + 1 if value.ndim == 1 else value, hidden_size)
