"""Parameter counts, floating point operations per token, and the peaks of devices, for the model FLOPs utilization.

This module does not import torch, so that tables and --help can use it.

    L layers, D hidden, F intermediate, V vocabulary, T sequence length, r rank of adapters
"""

from cucafera.config.schema import AdapterConfig, ModelConfig

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

Names are compared in full, because a part would match another GPU: an L40 an L4, or a MIG slice the full card.
"""


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of each linear layer of a block, by name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    key_value = config.num_key_value_heads * (hidden // config.num_attention_heads)
    return {
        "q_proj": (hidden, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def block_matrix_parameter_count(config: ModelConfig) -> int:
    """Return the number of parameters in the matrices of all blocks."""
    return config.num_hidden_layers * sum(outputs * inputs for outputs, inputs in layer_shapes(config).values())


def matrix_parameter_count(config: ModelConfig) -> int:
    """Return the number of parameters in matrix products: all but the gains; the tied embedding counts once."""
    return config.vocab_size * config.hidden_size + block_matrix_parameter_count(config)


def adapter_parameter_count(config: ModelConfig, adapter: AdapterConfig) -> int:
    """Return the number of parameters of low-rank adapters: r * (outputs + inputs) per adapted layer."""
    shapes = layer_shapes(config)
    return config.num_hidden_layers * sum(adapter.rank * sum(shapes[name]) for name in adapter.modules)


def parameter_count(config: ModelConfig) -> int:
    """Return the number of parameters of the decoder; the tied embedding counts once."""
    gains = (2 * config.num_hidden_layers + 1) * config.hidden_size
    return matrix_parameter_count(config) + gains


def trained_parameter_count(config: ModelConfig, adapter: AdapterConfig) -> int:
    """Return the number of parameters that are trained: those of the adapters, or all if there are none."""
    return adapter_parameter_count(config, adapter) or parameter_count(config)


def training_flops_per_token(
    config: ModelConfig, sequence_length: int, adapter: AdapterConfig | None = None, causal_half: bool = False
) -> int:
    """Return the floating point operations per training token, forward and backward, without recomputation.

    6 * matrix parameters + 12 * L * D * T (Chowdhery et al., 2022, PaLM, appendix B; the same as nanoGPT's
    `estimate_mfu`). The second term counts attention over the full window. This is the usual convention, although a
    causal model needs only half of it. With adapters the matrices are frozen, and 4 of the 6 remain: no gradients of
    the weights are computed.

    Args:
        config: The model.
        sequence_length: T, tokens of one window.
        adapter: The adapters that are trained; None or rank 0: all weights are trained.
        causal_half: Count only the half of the attention matrix that a causal model needs.

    Returns:
        FLOPs per token, as if each window were one document.
    """
    attention = 12 * config.num_hidden_layers * config.hidden_size * sequence_length
    matrices = 6 * matrix_parameter_count(config)
    if adapter is not None and adapter.rank:
        matrices = 4 * matrix_parameter_count(config) + 6 * adapter_parameter_count(config, adapter)
    return matrices + (attention // 2 if causal_half else attention)


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak of a GPU in FLOP/s, or None for a device that is not in the table.

    Args:
        device_name: From `torch.cuda.get_device_name`.
    """
    return PEAK_FLOPS.get(device_name.removeprefix("NVIDIA "))
