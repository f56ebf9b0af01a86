"""muP: the effect of a learning rate does not depend on the width, and the model stays a plain Llama."""

import importlib.util
from pathlib import Path

import pytest
import torch

from cucafera.config.schema import AdapterConfig, ModelConfig
from cucafera.model.lora import add_adapters
from cucafera.model.transformer import Block, Decoder
from cucafera.optimizers import build_optimizer, set_learning_rate
from cucafera.optimizers.adamw import AdamWConfig
from tests.support import Holder, hugging_face, random_ids, small_config, small_decoder

SCRIPT = Path(__file__).parents[2] / "scripts" / "transfer.py"


def trained(config: ModelConfig, steps: int = 4) -> Decoder:
    """Return a decoder after a few steps."""
    torch.manual_seed(0)
    decoder = Decoder(config)
    optimizer = build_optimizer(decoder, AdamWConfig())
    ids = random_ids(4, 33)
    for step in range(steps):
        set_learning_rate(optimizer, 1e-2 * (step + 1))
        decoder(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return decoder


def test_without_a_base_initial_weights_are_unscaled():
    decoder = small_decoder()
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(300, 48)  # modules initialize weights that are then replaced
    blocks = [Block(decoder.config, layer) for layer in range(2)]
    plain = [parameter for module in (embedding, *blocks) for parameter in module.parameters()]
    for parameter in plain:
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.1)
    for (name, parameter), expected in zip(decoder.named_parameters(), [*plain, torch.ones(48)], strict=True):
        assert torch.equal(parameter, expected), name
    groups = build_optimizer(decoder, AdamWConfig()).param_groups
    assert {group["name"]: group["weight_decay"] for group in groups} == {
        "embedding": 1.0, "block_matrices": 1.0, "gains": 0.0, "final_gain": 0.0
    }  # fmt: skip


def test_the_base_trains_as_a_model_without_a_base():
    plain, base = trained(small_config()), trained(small_config(base_hidden_size=48))
    for (name, parameter), other in zip(plain.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_with_a_base_initial_weights_are_the_same_values_scaled():
    plain, scaled = small_decoder(), small_decoder(base_hidden_size=12)
    for (name, parameter), other in zip(scaled.named_parameters(), plain.parameters(), strict=True):
        factor = 1 / 4 if name == "norm.weight" else 1 / 2 if "proj" in name else 1
        torch.testing.assert_close(parameter, factor * other, atol=1e-7, rtol=1e-6, msg=name)


def test_a_scaled_model_is_a_plain_llama():
    config = small_config(base_hidden_size=12)
    ours, theirs = Holder(config), hugging_face(config)
    ours.model = trained(config)
    assert theirs.load_state_dict(ours.state_dict(), strict=False).missing_keys == ["lm_head.weight"]  # tied
    input_ids = random_ids(3, 40)
    logits = ours.model.logits(ours.model(input_ids))
    torch.testing.assert_close(logits, theirs(input_ids).logits, atol=1e-5, rtol=0)


def test_learning_rates_fall_with_the_width_and_decay_per_step_is_constant():
    decoder = small_decoder(base_hidden_size=12)
    optimizer = build_optimizer(decoder, AdamWConfig(weight_decay=0.1))
    set_learning_rate(optimizer, 0.02)
    names = {parameter: name for name, parameter in decoder.named_parameters()}
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "embedding": 0.02, "block_matrices": 0.005, "gains": 0.02, "final_gain": 0.005
    }  # fmt: skip
    assert [names[parameter] for parameter in groups["embedding"]["params"]] == ["embed_tokens.weight"]
    assert [names[parameter] for parameter in groups["final_gain"]["params"]] == ["norm.weight"]
    assert len(groups["block_matrices"]["params"]) == 14
    assert len(groups["gains"]["params"]) == 4
    for name, product in {"embedding": 0.002, "block_matrices": 0.002, "gains": 0.0, "final_gain": 0.0}.items():
        assert groups[name]["lr"] * groups[name]["weight_decay"] == pytest.approx(product)


def test_adapters_have_the_same_learning_rate_at_every_width():
    decoder = small_decoder(base_hidden_size=12)
    add_adapters(decoder, AdapterConfig(rank=2))
    (adapters,) = build_optimizer(decoder, AdamWConfig()).param_groups
    assert len(adapters["params"]) == 28 and "lr_ratio" not in adapters


def test_a_step_changes_what_the_model_computes_equally_at_every_width():
    spec = importlib.util.spec_from_file_location("transfer", SCRIPT)
    transfer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(transfer)
    ids = random_ids(8, 33) % 20
    batches = [(ids[:, :-1], ids[:, 1:], None)] * 3
    slopes = {}
    for base in (None, 32):
        changes = {}
        for width in (32, 64, 128, 256):
            config = small_config(
                hidden_size=width, intermediate_size=2 * width, num_attention_heads=width // 16, num_key_value_heads=1,
                initializer_range=0.02, base_hidden_size=base,
            )  # fmt: skip
            changes[width] = transfer.changes(config, batches, learning_rate=5e-3)
        slopes[base] = transfer.slopes(changes)
    assert all(abs(slope) < 0.25 for slope in slopes[32].values()), slopes
    assert all(slope > 0.6 for slope in slopes[None].values()), slopes
