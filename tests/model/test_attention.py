"""Every attention kernel against softmax(QK^T)V."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from cucafera.model import attention
from cucafera.model.attention import (
    DocumentOffsets,
    attend,
    block_mask,
    dense_mask,
    document_mask,
    fastest_document_attention,
)

BATCH, QUERY_HEADS, KEY_VALUE_HEADS, TOKENS = 2, 6, 2, 300
"""More tokens than one block of queries, and not a multiple of it."""

CPU = torch.device("cpu")


def reference(queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """softmax(QK^T / sqrt(d))V with the full matrix in memory."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ values


def visible_tokens(documents: Tensor) -> Tensor:
    """Return the mask [B, 1, T, T] by its definition, one pair at a time."""
    pairs = [
        [[j <= i and row[i] == row[j] for j in range(len(row))] for i in range(len(row))] for row in documents.tolist()
    ]
    return torch.tensor(pairs, device=documents.device)[:, None]


def random_documents() -> Tensor:
    starts = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.02
    return starts.cumsum(1, dtype=torch.int32)


def random_heads(head_dim: int, queries: int = TOKENS) -> list[Tensor]:
    """Return queries, keys and values, and an upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(QUERY_HEADS, queries), (KEY_VALUE_HEADS, TOKENS), (KEY_VALUE_HEADS, TOKENS), (QUERY_HEADS, queries)]
    heads = [torch.randn(BATCH, *shape, head_dim, generator=generator) for shape in shapes]
    return [head.requires_grad_(index < 3) for index, head in enumerate(heads)]


def assert_same_as_reference(mask: attention.Mask, heads: list[Tensor], visible: Tensor, tolerance: float) -> None:
    """Compare the output and the gradients of queries, keys and values."""
    *inputs, upstream = heads
    expected = reference(*inputs, visible)
    result = attend(*inputs, mask)
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)
    for gradient, wanted in zip(
        torch.autograd.grad(result, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("head_dim", [32, 96])
def test_causal_attention_equals_the_reference(head_dim: int) -> None:
    visible = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    assert_same_as_reference(None, random_heads(head_dim), visible, 1e-5)


@pytest.mark.parametrize("head_dim", [32, 96])
def test_attention_within_documents_equals_the_reference(head_dim: int) -> None:
    documents = random_documents()
    mask = document_mask(documents, "dense", None)
    assert_same_as_reference(mask, random_heads(head_dim), visible_tokens(documents), 1e-5)


@pytest.mark.parametrize("new", [1, 7, 290])
def test_new_tokens_after_a_cache_attend_to_all_earlier_ones_and_themselves(new: int) -> None:
    visible = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[-new:]
    scores = torch.zeros(new, TOKENS).masked_fill(~visible, -torch.inf)
    for mask in (visible[None, None], scores[None, None], *([None] if new == 1 else [])):
        assert_same_as_reference(mask, random_heads(32, queries=new), visible, 1e-5)


@pytest.fixture
def uncompiled_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use eager flex_attention, which runs on the CPU, forward only."""
    monkeypatch.setattr(attention, "_compiled", lambda function: function)


@pytest.mark.usefixtures("uncompiled_flex_attention")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("head_dim", [32, 96])
def test_flex_attention_equals_the_dense_mask(head_dim: int) -> None:
    documents = random_documents()
    queries, keys, values, _ = (head.detach() for head in random_heads(head_dim))
    result = attend(queries, keys, values, block_mask(documents))
    torch.testing.assert_close(result, attend(queries, keys, values, dense_mask(documents)), atol=1e-5, rtol=1e-5)


def test_flex_attention_is_traced_without_graph_breaks() -> None:
    documents = random_documents()
    queries, keys, values, _ = (head.detach() for head in random_heads(32))

    def masked_attention(queries: Tensor, keys: Tensor, values: Tensor, documents: Tensor) -> Tensor:
        return attend(queries, keys, values, block_mask(documents))

    result = torch.compile(masked_attention, fullgraph=True, backend="eager")(queries, keys, values, documents)
    torch.testing.assert_close(result, attend(queries, keys, values, dense_mask(documents)), atol=1e-5, rtol=1e-5)


@pytest.fixture
def exact_products():
    """Turn TF32 off, which a run in the same process may have turned on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize(
    ("kernel", "dtype", "tolerance"),
    [
        ("flash", torch.bfloat16, 5e-2),
        ("flex", torch.bfloat16, 5e-2),
        ("flex", torch.float32, 1e-4),
        ("dense", torch.float32, 1e-4),
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [32, 96, 128])
def test_attention_within_documents_on_cuda_equals_the_reference(
    head_dim: int, kernel: str, dtype: torch.dtype, tolerance: float
) -> None:
    cuda = torch.device("cuda")
    if kernel == "flash" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("flash attention needs compute capability 8.0")
    documents = random_documents().to(cuda)
    heads = [head.detach().to(cuda, dtype).requires_grad_() for head in random_heads(head_dim)]
    mask = document_mask(documents, kernel, 64)
    assert type(mask) is {"flash": DocumentOffsets, "flex": BlockMask, "dense": Tensor}[kernel]
    assert_same_as_reference(mask, heads, visible_tokens(documents), tolerance)


def test_each_device_gets_its_fastest_kernel_for_documents() -> None:
    h100, t4 = (9, 0), (7, 5)
    assert fastest_document_attention("cuda", h100, half=True, head_dim=96) == "flash"
    assert fastest_document_attention("cuda", h100, half=False, head_dim=96) == "flex"
    assert fastest_document_attention("cuda", t4, half=False, head_dim=96) == "flex"
    assert fastest_document_attention("cuda", t4, half=True, head_dim=96) == "flex"
    assert fastest_document_attention("cuda", (8, 0), half=True, head_dim=256) == "flash"
    assert fastest_document_attention("cuda", h100, half=True, head_dim=264) == "flex"
    assert fastest_document_attention("cuda", h100, half=True, head_dim=100) == "flex"
    assert fastest_document_attention("cuda", h100, half=True, head_dim=12) == "dense"  # flex refuses heads under 16
    assert fastest_document_attention("cuda", h100, half=True, head_dim=8) == "flash"
    assert fastest_document_attention("cpu", (0, 0), half=True, head_dim=96) == "dense"
