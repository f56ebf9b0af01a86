"""Muon with AdamW: the updates of the papers, one matrix at a time, in float64."""

import copy

import pytest
import torch
from torch import Tensor

from cucafera.config.registry import OPTIMIZERS
from cucafera.config.schema import AdapterConfig
from cucafera.model.lora import add_adapters
from cucafera.optimizers import _muon_with_adamw, build_optimizer, set_learning_rate
from cucafera.optimizers._muon_with_adamw import orthogonalized, row_normalized
from cucafera.optimizers.adamw import AdamWConfig
from cucafera.optimizers.muon import MuonConfig
from tests.support import random_ids, small_decoder

SETTINGS = {
    "lr": 0.01, "matrix_lr": 0.05, "matrix_weight_decay": 0.4, "momentum": 0.8, "betas": [0.7, 0.9], "eps": 1e-3,
}  # fmt: skip


def gradients_of(model: torch.nn.Module, step: int) -> None:
    """Give the model the gradients of a batch."""
    ids = random_ids(4, 33 + step)
    (model(ids[:, :-1], ids[:, 1:]) / 128).backward()


def orthogonal_by_hand(matrix: Tensor) -> Tensor:
    """Return the result of five Newton-Schulz iterations, by the polynomial of the singular values."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("cautious", [True, False])
@pytest.mark.parametrize("row_normalization", [True, False])
def test_updates_are_those_of_the_papers_by_hand(cautious, row_normalization):
    config = MuonConfig(**SETTINGS, cautious=cautious, row_normalization=row_normalization)
    model = small_decoder()
    matrices = {name: parameter for name, parameter in model.named_parameters() if "proj" in name}
    optimizer = build_optimizer(model, config)
    weights = {name: parameter.detach().double() for name, parameter in matrices.items()}
    means = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    squares = {name: torch.zeros(len(weight), 1).double() for name, weight in weights.items()}
    for step in (1, 2, 3):
        rate = 0.05 / step
        set_learning_rate(optimizer, 0.01 / step)
        gradients_of(model, step)
        for name, parameter in matrices.items():
            gradient, weight = parameter.grad.double(), weights[name]
            means[name] = 0.8 * means[name] + 0.2 * gradient
            update = orthogonal_by_hand(0.8 * means[name] + 0.2 * gradient)
            if row_normalization:
                squares[name] = 0.95 * squares[name] + 0.05 * update.square().mean(1, keepdim=True)
                norm, update = update.norm(), update / squares[name].sqrt()
                update = update * norm / update.norm()
            update = rate * max(1, weight.shape[0] / weight.shape[1]) ** 0.5 * update
            decayed = 0.4 * rate * weight
            weights[name] = weight - update - (decayed * (weight * update > 0) if cautious else decayed)
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in matrices.items():
            torch.testing.assert_close(parameter.double(), weights[name], rtol=1e-3, atol=1e-5, msg=name)


def test_without_its_own_features_it_is_pytorchs_muon():
    """torch.optim.Muon computes in bf16, so the updates agree within the precision of that."""
    config = MuonConfig(**SETTINGS, cautious=False, row_normalization=False)
    model = small_decoder()
    theirs = {
        name: torch.nn.Parameter(weight.detach().clone()) for name, weight in model.named_parameters() if "proj" in name
    }
    reference = torch.optim.Muon(
        theirs.values(), lr=0.05, weight_decay=0.4, momentum=0.8, nesterov=True, adjust_lr_fn="original"
    )
    optimizer = build_optimizer(model, config)
    start = {name: weight.detach().clone() for name, weight in theirs.items()}
    for step in (1, 2, 3):
        gradients_of(model, step)
        for name, parameter in model.named_parameters():
            if name in theirs:
                theirs[name].grad = parameter.grad.clone()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        if name in theirs:
            change = theirs[name] - start[name]
            assert (parameter - theirs[name]).norm() < 0.03 * change.norm(), name


def test_everything_else_is_trained_exactly_as_by_adamw_without_decay():
    ours = small_decoder()
    theirs = copy.deepcopy(ours)
    muon = build_optimizer(ours, MuonConfig(**SETTINGS))
    adamw = build_optimizer(theirs, AdamWConfig(lr=0.01, betas=[0.7, 0.9], eps=1e-3, weight_decay=0.0))
    for step in (1, 2):
        gradients_of(ours, step)
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.grad = parameter.grad.clone()
        muon.step()
        adamw.step()
        muon.zero_grad()
    trained_by_muon = 0
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, other) == ("proj" not in name), name
        trained_by_muon += "proj" in name
    assert trained_by_muon == 14
    groups = {group["name"]: group for group in muon.param_groups}
    assert list(groups) == ["embedding", "block_matrices", "gains", "final_gain"]
    assert groups["block_matrices"]["lr"] == 0.05
    assert {name: group["weight_decay"] for name, group in groups.items() if group["weight_decay"]} == {
        "block_matrices": 0.4
    }


def test_adapters_are_trained_as_by_adamw():
    model = small_decoder()
    add_adapters(model, AdapterConfig(rank=2))
    (group,) = build_optimizer(model, MuonConfig(lr=0.01, weight_decay=0.3)).param_groups
    assert (group["name"], group["lr"], group["weight_decay"]) == ("adapters", 0.01, 0.3)
    assert "momentum" not in group


def test_the_matrix_rate_is_the_same_at_every_width():
    groups = {
        group["name"]: group
        for group in build_optimizer(small_decoder(base_hidden_size=12), MuonConfig(**SETTINGS)).param_groups
    }
    assert groups["block_matrices"]["lr"] == 0.05 and groups["block_matrices"]["weight_decay"] == 0.4
    assert groups["embedding"]["lr"] == 0.01 and groups["final_gain"]["lr"] == 0.01 / 4


@pytest.mark.parametrize("shape", [(3, 24, 60), (3, 60, 24), (2, 32, 32)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalized(matrices)
    in_their_basis = left.mT @ found @ right.mT
    values = in_their_basis.diagonal(dim1=1, dim2=2)
    assert ((values > 0.3) & (values < 1.25)).all()  # the smallest, of square ones, are still on their way
    assert (in_their_basis - torch.diag_embed(values)).abs().max() < 1e-3
    assert torch.equal(orthogonalized(torch.zeros(shape)), torch.zeros(shape))


def test_normalized_rows_have_one_size_and_the_matrix_keeps_its_norm():
    updates = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 8)[:, None]
    normalized, squares = row_normalized(updates, torch.zeros(2, 8, 1))
    torch.testing.assert_close(normalized.norm(dim=(1, 2)), updates.norm(dim=(1, 2)))
    sizes = normalized.norm(dim=2)
    torch.testing.assert_close(sizes, sizes[:, :1].expand(2, 8))
    torch.testing.assert_close(squares, 0.05 * updates.square().mean(2, keepdim=True))


def test_matrices_are_updated_alike_in_any_number_of_batches(monkeypatch):
    models = [small_decoder() for _ in range(2)]
    for model, size in zip(models, (2**26, 1), strict=True):
        monkeypatch.setattr(_muon_with_adamw, "BATCH_ELEMENTS", size)
        optimizer = build_optimizer(model, MuonConfig(**SETTINGS))
        for step in (1, 2):
            gradients_of(model, step)
            optimizer.step()
            optimizer.zero_grad()
    for parameter, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-6)


def test_a_change_of_rows_normalization_within_a_run_starts_their_statistics():
    model = small_decoder()
    before = build_optimizer(model, MuonConfig(**SETTINGS, row_normalization=False))
    gradients_of(model, 1)
    before.step()
    after = build_optimizer(model, MuonConfig(**SETTINGS, row_normalization=True))
    state, groups = before.state_dict(), after.state_dict()["param_groups"]
    after.load_state_dict({"state": state["state"], "param_groups": groups})
    after.step()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_the_size_of_the_state_is_what_the_formulas_take(name, rank):
    from cucafera.config.command_line import composed_config

    model = small_decoder()
    config = composed_config([f"optimizer={name}"])
    config.model, config.adapter.rank = model.config, rank
    add_adapters(model, config.adapter)
    optimizer = build_optimizer(model, config.optimizer)
    gradients_of(model, 1)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert sum(value.nbytes for value in moments) == OPTIMIZERS.get(name).state_bytes(config)
