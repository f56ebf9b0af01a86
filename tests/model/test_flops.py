"""Parameter counts, FLOPs and peaks for MFU."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cucafera.config.schema import AdapterConfig, ModelConfig
from cucafera.model.flops import adapter_parameter_count, parameter_count, peak_flops, training_flops_per_token
from cucafera.model.lora import add_adapters
from cucafera.model.transformer import Decoder
from tests.support import CUCAFERA, small_config


@pytest.mark.parametrize("config", [CUCAFERA, ModelConfig(), ModelConfig(num_key_value_heads=6, num_hidden_layers=1)])
def test_the_parameter_count_equals_that_of_the_decoder(config: ModelConfig) -> None:
    with torch.device("meta"):
        decoder = Decoder(config)
    assert parameter_count(config) == sum(parameter.numel() for parameter in decoder.parameters())


def test_cucafera_has_245_020_416_parameters() -> None:
    assert parameter_count(CUCAFERA) == 245_020_416


def test_training_flops_follow_the_full_attention_convention_or_its_causal_half() -> None:
    attention = 12 * 30 * 768 * 2048
    assert training_flops_per_token(CUCAFERA, 2048) == 6 * 244_973_568 + attention
    assert training_flops_per_token(CUCAFERA, 2048, causal_half=True) == 6 * 244_973_568 + attention // 2


def counted_flops_per_token(config: ModelConfig, tokens: int, adapter: AdapterConfig) -> float:
    """Operations that PyTorch counts in a step of one window: matrix products, forward and backward."""
    model = Decoder(config)
    add_adapters(model, adapter)
    ids = torch.randint(0, config.vocab_size, (1, tokens))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        F.cross_entropy(model.logits(model(ids))[0], ids[0]).backward()
    return counter.get_total_flops() / tokens


def test_training_flops_are_those_that_pytorch_counts() -> None:
    config, tokens = small_config(), 32
    counted = counted_flops_per_token(config, tokens, AdapterConfig(rank=0))
    assert training_flops_per_token(config, tokens) == counted


@pytest.mark.parametrize("modules", [["q_proj", "k_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "down_proj"]])
def test_flops_with_adapters_are_those_that_pytorch_counts(modules: list[str]) -> None:
    config, adapter, tokens = small_config(num_hidden_layers=3), AdapterConfig(rank=4, modules=modules), 32
    key_value = 24
    # The embedding is frozen, so no gradient reaches it: not through the first layer's three projections (48 to 48, 24
    # and 24) and the first matrices of their adapters (48 to 4), of which each would take 2 operations per parameter.
    not_computed = 2 * (48 * (48 + 2 * key_value) + 3 * 4 * 48)
    counted = counted_flops_per_token(config, tokens, adapter)
    assert training_flops_per_token(config, tokens, adapter) - not_computed == counted
    in_layer = 4 * (48 + 48) + 2 * 4 * (48 + key_value) + (4 * (80 + 48) if "down_proj" in modules else 0)
    assert adapter_parameter_count(config, adapter) == 3 * in_layer


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA RTX A6000", 154.8e12),
    ],
)
def test_a_known_gpu_has_its_dense_bf16_peak(name: str, peak: float) -> None:
    assert peak_flops(name) == peak


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "Tesla T4",
        "NVIDIA A1000",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA GB200",
        "NVIDIA GH200 480GB",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H100 NVL",
        "NVIDIA L40",
    ],
)
def test_an_unknown_gpu_has_no_peak(name: str) -> None:
    assert peak_flops(name) is None


def test_torch_is_not_imported() -> None:
    code = "import sys, cucafera.model.flops; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
