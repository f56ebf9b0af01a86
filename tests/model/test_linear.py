"""The products of a decode step: of one row with several threads, and of a few rows with a large weight."""

import pytest
import torch
import torch.nn.functional as F

from cucafera.model.linear import Linear, linear


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=[0, 1 << 20])
def smallest_shared(request, monkeypatch):
    monkeypatch.setattr("cucafera.model.linear.MIN_PARALLEL_ELEMENTS", request.param)


@pytest.mark.parametrize("smallest_head", [0, 1 << 20])
@pytest.mark.parametrize("shape", [(1, 48), (1, 1, 48), (48,), (5, 48), (2, 3, 48), (16, 48), (17, 1, 48), (0, 48)])
@pytest.mark.parametrize("outputs", [96, 97])
def test_the_product_equals_that_of_pytorch(threads, smallest_shared, smallest_head, shape, outputs, monkeypatch):
    monkeypatch.setattr("cucafera.model.linear.HEAD_ELEMENTS", smallest_head)
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(outputs, 48)
    with torch.no_grad():
        ours = linear(x, weight)
    assert ours.shape == (*shape[:-1], outputs)
    torch.testing.assert_close(ours, F.linear(x, weight))


def test_a_row_in_training_has_gradients(threads, smallest_shared):
    layer = Linear(48, 96)
    x = torch.randn(1, 48, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0, keepdim=True))


def test_half_precision_rows_stay_in_half_precision(threads, smallest_shared):
    x, weight = torch.randn(1, 48).bfloat16(), torch.randn(96, 48).bfloat16()
    with torch.no_grad():
        assert torch.equal(linear(x, weight), F.linear(x, weight))
