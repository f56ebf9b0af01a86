"""The compiled decoder against eager mode: each attention kernel, with and without checkpointing and autocast.

The compiler takes the step apart, decomposes and partitions it as always, and what it found runs as it is: its own
kernels take minutes to build. One case has them built, in test_transformer.py.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from cucafera.model import flash_attention
from cucafera.model.attention import attend, dense_mask, document_limit, document_offsets
from cucafera.model.transformer import Decoder
from tests.support import documents_of, random_ids, small_config

DOCUMENT_START = 1
ROUNDING = {"fp32": 1e-5, "bf16": 0.03}
"""Tolerance relative to a gradient's largest element: the compiled model rounds to bf16 at other operations."""


@torch.library.custom_op("cucafera_tests::varlen", mutates_args=())
def varlen(queries: Tensor, keys: Tensor, values: Tensor, cumulative: Tensor) -> Tensor:
    """`varlen_attn` for a CPU: each document separately; as opaque to the compiler as the real one."""
    mixed = torch.empty_like(queries)
    for begin, end in zip(cumulative.tolist(), cumulative.tolist()[1:], strict=False):
        parts = (heads[begin:end].transpose(0, 1)[None] for heads in (queries, keys, values))
        if begin < end:
            mixed[begin:end] = attend(*parts, None)[0].transpose(0, 1)
    return mixed


@varlen.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, cumulative: Tensor) -> Tensor:
    return torch.empty_like(queries)


@torch.library.custom_op("cucafera_tests::varlen_backward", mutates_args=())
def varlen_backward(
    upstream: Tensor, queries: Tensor, keys: Tensor, values: Tensor, cumulative: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values."""
    # By hand, since autograd records nothing inside an operator (Dao et al., 2022, FlashAttention, appendix B.2).
    gradients = tuple(torch.empty_like(heads) for heads in (queries, keys, values))
    group = queries.shape[1] // keys.shape[1]
    for begin, end in zip(cumulative.tolist(), cumulative.tolist()[1:], strict=False):
        wide = [heads[begin:end].transpose(0, 1).float() for heads in (upstream, queries, keys, values)]
        above, q, k, v = *wide[:2], *(heads.repeat_interleave(group, 0) for heads in wide[2:])
        visible = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
        scale = queries.shape[-1] ** -0.5
        weights = (scale * q @ k.mT).masked_fill(~visible, -torch.inf).softmax(-1)
        of_weights = above @ v.mT
        of_scores = scale * weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
        found = (of_scores @ k, of_scores.mT @ q, weights.mT @ above)
        for gradient, wide_gradient in zip(gradients, found, strict=True):
            narrow = wide_gradient.unflatten(0, (gradient.shape[1], -1)).sum(1)
            gradient[begin:end] = narrow.transpose(0, 1)
    return gradients


@varlen_backward.register_fake
def _(
    upstream: Tensor, queries: Tensor, keys: Tensor, values: Tensor, cumulative: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)


varlen.register_autograd(
    lambda ctx, upstream: (*varlen_backward(upstream, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.fixture(autouse=True)
def kernels_of_a_gpu(monkeypatch):
    """Replace varlen_attn, which needs CUDA, and give eager flex attention gradients on a CPU."""
    monkeypatch.setattr(
        flash_attention,
        "varlen_attn",
        lambda queries, keys, values, begins, _, longest, __, **how: varlen(queries, keys, values, begins),
    )
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *heads: None)
    monkeypatch.setattr("cucafera.model.attention._compiled", lambda function: function)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradients(decoder: Decoder, documents: Tensor | None, half: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of two windows with some targets ignored, and the gradient of each parameter."""
    input_ids, targets = random_ids(2, 48).int(), random_ids(2, 48).int()
    targets[:, :5] = -100
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        loss = decoder(input_ids, targets, documents, document_limit=document_limit(6))
    loss.backward()
    found = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    decoder.zero_grad(set_to_none=True)
    return loss.detach(), found


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "checkpointing"]
)
@pytest.mark.parametrize("attention", ["causal", "dense", "flex", "flash"])
def test_gradients_of_the_compiled_decoder_equal_eager_mode(attention, checkpointing, precision):
    torch.manual_seed(0)
    residual_dtype = torch.bfloat16 if precision == "bf16" else None
    config = small_config(hidden_size=64, num_attention_heads=4)
    decoder = Decoder(config, checkpointing, "dense" if attention == "causal" else attention, residual_dtype)
    input_ids = random_ids(2, 48)
    input_ids[0, [0, 20]] = input_ids[1, [7, 9, 30]] = DOCUMENT_START
    documents = None if attention == "causal" else documents_of(input_ids)
    loss, expected = gradients(decoder, documents, precision == "bf16")
    if attention != "causal":  # the eager kernels agree with each other
        decoder.document_attention = "dense"
        same_loss, same = gradients(decoder, documents, precision == "bf16")
        decoder.document_attention = attention
        assert_close(loss, expected, same_loss, same, ROUNDING[precision])
    decoder.compile(backend="aot_eager_decomp_partition", fullgraph=not checkpointing, dynamic=False)
    assert_close(loss, expected, *gradients(decoder, documents, precision == "bf16"), ROUNDING[precision])


def assert_close(loss: Tensor, expected: dict[str, Tensor], found_loss: Tensor, found: dict[str, Tensor], rounding):
    """Compare loss and gradients; each gradient by its largest element, and none is zero."""
    torch.testing.assert_close(found_loss, loss, rtol=rounding, atol=0)
    for name, gradient in expected.items():
        assert found[name].any(), name
        largest = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=rounding * largest, msg=name)


def test_varlen_attention_equals_the_dense_mask():
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [4, 5, 5, 5, 5, 6]], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(2, heads, 6, 8, generator=generator) for heads in (4, 2, 2))
    lengths = document_offsets(documents, 8)
    assert lengths.cu_seqlens.tolist() == [0, 3, 5, 6, 7, 11, 12, 12, 12]
    mixed = attend(queries, keys, values, lengths)
    torch.testing.assert_close(mixed, attend(queries, keys, values, dense_mask(documents)), atol=1e-6, rtol=0)


def test_more_documents_than_the_limit_are_refused():
    documents = torch.arange(5, dtype=torch.int32)[None]
    assert document_offsets(documents, 5).cu_seqlens.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(RuntimeError, match="out of bounds"):
        document_offsets(documents, 4)


def test_the_document_limit_grows_only_if_it_is_exceeded():
    assert document_limit(40) == 64
    assert [document_limit(documents, before=64) for documents in (1, 64, 65, 100)] == [64, 64, 128, 256]
