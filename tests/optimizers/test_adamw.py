"""AdamW: the update of its paper, with the settings of the configuration."""

import pytest
import torch

from cucafera.config.schema import AdapterConfig
from cucafera.model.lora import add_adapters
from cucafera.optimizers import build_optimizer, set_learning_rate
from cucafera.optimizers.adamw import AdamWConfig
from tests.support import random_ids, small_decoder

SETTINGS = AdamWConfig(lr=0.02, betas=[0.7, 0.9], eps=1e-3, weight_decay=0.3)


def test_updates_are_those_of_the_paper_by_hand():
    model = small_decoder()
    optimizer = build_optimizer(model, SETTINGS)
    first, second = SETTINGS.betas
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    means, squares = ({name: torch.zeros_like(value) for name, value in weights.items()} for _ in range(2))
    ids = random_ids(4, 33)
    for step in (1, 2, 3):
        rate = 0.02 / step
        set_learning_rate(optimizer, rate)
        (model(ids[:, :-1], ids[:, 1:]) / 128).backward()
        for name, parameter in model.named_parameters():
            means[name] = first * means[name] + (1 - first) * parameter.grad
            squares[name] = second * squares[name] + (1 - second) * parameter.grad**2
            direction = means[name] / (1 - first**step) / ((squares[name] / (1 - second**step)).sqrt() + SETTINGS.eps)
            decay = SETTINGS.weight_decay if parameter.ndim == 2 else 0.0  # gains are not decayed
            weights[name] = weights[name] - rate * decay * weights[name] - rate * direction
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, weights[name], rtol=1e-4, atol=1e-6, msg=name)


def test_frozen_weights_are_not_optimized():
    model = small_decoder()
    add_adapters(model, AdapterConfig(rank=2, modules=["q_proj"]))
    groups = build_optimizer(model, SETTINGS).param_groups
    optimized = [parameter for group in groups for parameter in group["params"]]
    assert {id(parameter) for parameter in optimized} == {
        id(parameter) for name, parameter in model.named_parameters() if ".lora_" in name
    }
    assert len(optimized) == 2 * model.config.num_hidden_layers


def test_the_embedding_has_its_own_rate_and_the_same_decay_per_step():
    settings = AdamWConfig(lr=0.02, embedding_lr=0.08, weight_decay=0.1)
    groups = {group["name"]: group for group in build_optimizer(small_decoder(), settings).param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "embedding": 0.08, "block_matrices": 0.02, "gains": 0.02, "final_gain": 0.02
    }  # fmt: skip
    for name in ("embedding", "block_matrices"):
        assert groups[name]["lr"] * groups[name]["weight_decay"] == pytest.approx(0.002)
