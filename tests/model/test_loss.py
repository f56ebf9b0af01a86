"""The chunked loss against the plain one."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cucafera.model import loss as loss_module
from cucafera.model.loss import linear_cross_entropy, linear_loss_and_accuracy, token_logprobs

TOKENS, HIDDEN, VOCABULARY = 37, 24, 101


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets, a third of them ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    targets[::3] = -100
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


@pytest.mark.parametrize("chunk_tokens", [1, 8, 36, 37, 1000, None])
@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_loss_and_gradients_equal_the_plain_ones_for_any_chunk_size(chunk_tokens: int | None, factor: float) -> None:
    hidden, weight, targets = inputs()
    expected = plain(hidden, weight, targets)
    loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=chunk_tokens)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    for gradient, wanted in zip(
        torch.autograd.grad(factor * loss, (hidden, weight)),
        torch.autograd.grad(factor * expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)


def test_ignored_targets_give_no_gradient() -> None:
    hidden, weight, targets = inputs()
    targets[targets == -100] = 7
    targets[5] = 7
    linear_cross_entropy(hidden, weight, targets, ignore_index=7, chunk_tokens=8).backward()
    assert hidden.grad is not None
    assert not hidden.grad[targets == 7].any()
    assert hidden.grad[targets != 7].any(dim=1).all()


@pytest.mark.parametrize("chunk_tokens", [1, 8, None])
@pytest.mark.parametrize("ignored", [-100, 0])
def test_predictions_are_counted_where_there_is_a_target(chunk_tokens: int | None, ignored: int) -> None:
    hidden, weight, targets = inputs()
    predicted = F.linear(hidden, weight).argmax(1)
    right = torch.arange(TOKENS) % 2 == 0
    targets = torch.where(right, predicted, (predicted + 1) % VOCABULARY)
    targets[::3] = ignored
    with torch.no_grad():
        weight[0] = 100 * hidden[3]  # entry 0 is the prediction where a target is ignored
        predicted = F.linear(hidden, weight).argmax(1)
        loss, correct = linear_loss_and_accuracy(hidden, weight, targets, ignored, chunk_tokens)
    valid = targets != ignored
    assert predicted[3] == 0 and not valid[3]
    assert int(correct) == int((predicted == targets)[valid].sum()) > 0
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(hidden, weight)[valid], targets[valid], reduction="sum"))


@pytest.mark.parametrize("with_gradient", [True, False])
def test_without_a_valid_target_the_loss_and_the_gradients_are_zero(with_gradient: bool) -> None:
    hidden, weight, targets = inputs()
    with torch.set_grad_enabled(with_gradient):
        loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), chunk_tokens=8)
    assert loss.item() == 0.0
    if with_gradient:
        for gradient in torch.autograd.grad(loss, (hidden, weight)):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_without_gradients_the_loss_is_the_same_and_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = inputs()
    expected = linear_cross_entropy(hidden, weight, targets, chunk_tokens=8)
    monkeypatch.setattr(loss_module, "_LinearCrossEntropy", None)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=8)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)


def test_only_the_needed_gradients_are_computed() -> None:
    hidden, weight, targets = inputs()
    linear_cross_entropy(hidden.detach(), weight, targets).backward()
    expected = torch.autograd.grad(plain(hidden, weight, targets), weight)[0]
    torch.testing.assert_close(weight.grad, expected, atol=1e-5, rtol=1e-5)


def test_large_logits_stay_finite() -> None:
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(1000 * hidden, weight, targets, chunk_tokens=8)
    torch.testing.assert_close(loss, plain(1000 * hidden, weight, targets))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, (hidden, weight)))


def test_a_second_backward_pass_is_refused_instead_of_scaling_twice() -> None:
    hidden, weight, targets = inputs()
    loss = 0.5 * linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_under_autocast_the_products_are_bf16_and_the_rest_fp32() -> None:
    hidden, weight, targets = inputs()
    expected = plain(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=8)
        plain_loss = plain(hidden, weight, targets)
    assert loss.dtype == torch.float32
    # The same rounded products as the plain loss under autocast, so much nearer to it than to fp32.
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=0)
    assert not math.isclose(loss.item(), expected.item(), rel_tol=1e-6)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, wanted, atol=0.03 * wanted.abs().max().item(), rtol=0)


def test_under_autocast_the_gradient_of_the_weight_is_summed_in_fp32() -> None:
    # 4,096 equal contributions: a bf16 sum would stop growing when it is 256 times as large as one of them.
    hidden, weight = torch.ones(4096, 1), torch.zeros(2, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.int64), chunk_tokens=1).backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [-2048.0, 2048.0]


def test_the_loss_is_traced_without_graph_breaks() -> None:
    # Only traced: the decoder's own test runs the whole compiler.
    hidden, weight, targets = inputs()
    expected = linear_cross_entropy(hidden, weight, targets, chunk_tokens=8)
    traced = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    loss = traced(hidden, weight, targets, chunk_tokens=8)
    torch.testing.assert_close(loss, expected)
    for gradient, wanted in zip(
        torch.autograd.grad(0.5 * loss, (hidden, weight)),
        torch.autograd.grad(0.5 * expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, None])
def test_each_log_probability_and_its_gradient_equal_the_plain_ones(chunk_tokens: int | None) -> None:
    hidden, weight, targets = inputs()
    targets = targets.clamp_min(0)
    expected = F.linear(hidden, weight).log_softmax(1).gather(1, targets[:, None])[:, 0]
    logprobs = token_logprobs(hidden, weight, targets.int(), chunk_tokens)
    torch.testing.assert_close(logprobs, expected)
    assert torch.equal(logprobs, token_logprobs(hidden.detach(), weight.detach(), targets, chunk_tokens))
    factors = torch.linspace(-2, 3, TOKENS)
    # A loss that is no sum: the factor of each token depends on all of them.
    for loss_of in (lambda values: (factors * values).sum(), lambda values: -F.logsigmoid((factors * values).sum())):
        for gradient, wanted in zip(
            torch.autograd.grad(loss_of(logprobs), (hidden, weight), retain_graph=True),
            torch.autograd.grad(loss_of(expected), (hidden, weight), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5)


def test_log_probabilities_of_no_token_have_gradients_of_zero() -> None:
    hidden, weight, targets = inputs()
    logprobs = token_logprobs(hidden[:0], weight, targets[:0])
    assert logprobs.shape == (0,)
    (gradient,) = torch.autograd.grad(logprobs.sum(), weight)
    assert not gradient.any() and gradient.shape == weight.shape


def test_a_frozen_head_gets_no_gradient_from_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = inputs()
    expected = torch.autograd.grad(token_logprobs(hidden, weight, targets.clamp_min(0)).sum(), hidden)
    monkeypatch.setattr(loss_module, "_addmm_into", None)  # what would compute it
    found = torch.autograd.grad(token_logprobs(hidden, weight.detach(), targets.clamp_min(0)).sum(), hidden)
    assert torch.equal(found[0], expected[0])


def test_under_autocast_log_probabilities_are_those_of_bf16_products() -> None:
    hidden, weight, targets = inputs()
    targets = targets.clamp_min(0)
    expected = -F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")
    with torch.autocast("cpu", torch.bfloat16):
        logprobs = token_logprobs(hidden, weight, targets, chunk_tokens=8)
        plain_logprobs = -F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, plain_logprobs, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected.sum(), (hidden, weight)), strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, wanted, atol=0.03 * wanted.abs().max().item(), rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_in_bf16_log_probabilities_equal_fp64_within_rounding() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(5000, 96, generator=generator, device="cuda")  # more than one chunk, the last not filled
    weight = 0.1 * torch.randn(65_536, 96, generator=generator, device="cuda")
    targets = torch.randint(65_536, (5000,), generator=generator, device="cuda", dtype=torch.int32)
    factors = torch.linspace(-1, 1, 5000, device="cuda")
    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact = -F.cross_entropy(exact_hidden @ exact_weight.T, targets.long(), reduction="none")
    wanted = torch.autograd.grad((factors * exact).sum(), (exact_hidden, exact_weight))
    with torch.autocast("cuda", torch.bfloat16):
        logprobs = token_logprobs(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert (logprobs - exact).norm() < 0.01 * exact.norm()
    for found, gradient in zip(torch.autograd.grad((factors * logprobs).sum(), (hidden, weight)), wanted, strict=True):
        assert found.dtype == torch.float32
        assert (found - gradient).norm() < 0.01 * gradient.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_cuda_in_bf16_loss_and_gradients_equal_fp32_within_rounding(compiled: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(5000, 96, generator=generator, device="cuda")  # more than one chunk, the last not filled
    weight = 0.1 * torch.randn(65_536, 96, generator=generator, device="cuda")
    targets = torch.randint(65_536, (5000,), generator=generator, device="cuda", dtype=torch.int32)
    targets[::8] = -100
    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = F.cross_entropy(exact_hidden @ exact_weight.T, targets.long(), reduction="sum")
    wanted = torch.autograd.grad(expected, (exact_hidden, exact_weight))
    del expected
    hidden.requires_grad_()
    weight.requires_grad_()
    function = torch.compile(linear_cross_entropy, fullgraph=True) if compiled else linear_cross_entropy
    with torch.autocast("cuda", torch.bfloat16):
        loss = function(hidden, weight, targets)
    for found, exact in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
        assert found.dtype == torch.float32
        assert (found - exact).norm() < 0.01 * exact.norm()
