"""Parameter counts, FLOPs and peaks for MFU."""

import subprocess
import sys

import pytest
import torch

from cucafera.config.schema import ModelConfig
from cucafera.model.flops import parameter_count, peak_flops, training_flops_per_token
from cucafera.model.transformer import Decoder
from tests.support import CUCAFERA


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
