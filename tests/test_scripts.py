"""The scripts around the package, where they can be tested without measuring."""

import math

import pytest
import torch

from cucafera.composition import composed_config
from cucafera.data.windows import Batch
from cucafera.model.flops import parameter_count
from tests.test_readme import load_script


@pytest.mark.parametrize("peer", ["bare loop", "original", "Hugging Face"])
def test_the_peers_of_the_speed_benchmark_are_the_same_model(peer):
    config = composed_config(["model.vocab_size=320", "model.num_hidden_layers=2"]).model
    torch.manual_seed(0)
    model, loss_of = load_script("benchmark_training").LOOPS[peer](config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(config)
    ids = torch.randint(10, 320, (2, 65))
    loss = loss_of(Batch(ids[:, :-1], ids[:, 1:], None))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    if peer != "original":  # it is measured only, and keeps PyTorch's larger initial weights
        assert loss.item() == pytest.approx(math.log(320), rel=0.05)
