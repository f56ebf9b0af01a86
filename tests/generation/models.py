"""A small random model for the tests of decoding."""

import torch

from cucafera.config.schema import ModelConfig, SamplingConfig

GREEDY = SamplingConfig(temperature=0, repetition_penalty=1.0, max_new_tokens=20)
NO_STOP: frozenset[int] = frozenset()
CONFIG = ModelConfig(
    vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=48, initializer_range=0.5,
)  # fmt: skip


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random prompts without control tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, 300, (length,), generator=generator).tolist() for length in lengths]
