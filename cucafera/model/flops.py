"""Parameters, floating point operations a token, and the peaks of devices: what MFU is made of.

Nothing here imports torch: tables and --help need these numbers too.

    L layers, D hidden, F intermediate, V vocabulary, T sequence length
"""

from cucafera.config import ModelConfig

PEAK_FLOPS = {
    "A10": 125e12,
    "A100 80GB PCIe": 312e12,
    "A100-PCIE-40GB": 312e12,
    "A100-SXM4-40GB": 312e12,
    "A100-SXM4-80GB": 312e12,
    "A10G": 70e12,
    "B200": 2250e12,
    "GeForce RTX 3090": 71e12,
    "GeForce RTX 4090": 165.2e12,
    "H100 80GB HBM3": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX A6000": 154.8e12,
}
"""Dense bf16 peak in FLOP/s, without sparsity and with fp32 accumulation, from NVIDIA's data sheets.

The names are whole, because a part would take one GPU for another: an L40 for an L4, or a slice of an A100 for it all.
"""


def matrix_parameter_count(config: ModelConfig) -> int:
    """Parameters that take part in matrix products: all but the gains. The tied embedding counts once, as the head."""
    head_dim = config.hidden_size // config.num_attention_heads
    query_and_output = 2 * config.hidden_size * config.num_attention_heads * head_dim
    key_and_value = 2 * config.hidden_size * config.num_key_value_heads * head_dim
    mlp = 3 * config.hidden_size * config.intermediate_size
    embedding = config.vocab_size * config.hidden_size
    return embedding + config.num_hidden_layers * (query_and_output + key_and_value + mlp)


def parameter_count(config: ModelConfig) -> int:
    """All parameters of the decoder, the tied embedding counted once."""
    gains = (2 * config.num_hidden_layers + 1) * config.hidden_size
    return matrix_parameter_count(config) + gains


def training_flops_per_token(config: ModelConfig, sequence_length: int, causal_half: bool = False) -> int:
    """Floating point operations that one training token costs, forward and backward, without any recomputation.

    6 * matrix parameters + 12 * L * D * T (Chowdhery et al., 2022, PaLM, appendix B; the same as nanoGPT's
    `estimate_mfu`). The second term counts attention over the whole window. This is the usual convention, although a
    causal model needs only half of it.

    Args:
        config: The model.
        sequence_length: T, tokens of one window.
        causal_half: Count only the half of the attention matrix that a causal model needs.

    Returns:
        FLOPs a token; documents that mask each other are not taken into account.
    """
    attention = 12 * config.num_hidden_layers * config.hidden_size * sequence_length
    return 6 * matrix_parameter_count(config) + (attention // 2 if causal_half else attention)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU in FLOP/s, or None for a device that is not in the table.

    Args:
        device_name: As `torch.cuda.get_device_name` gives it.
    """
    return PEAK_FLOPS.get(device_name.removeprefix("NVIDIA "))
