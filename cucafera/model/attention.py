"""Causal attention within documents, with a kernel chosen by device. All kernels compute the same function.

B batch, T new tokens, S tokens so far (T of them new), H heads, K key/value heads, d head dim

| case                     | CPU                       | CUDA                                            |
|--------------------------|---------------------------|-------------------------------------------------|
| causal                   | SDPA, is_causal           | SDPA, is_causal                                 |
| causal, in documents     | SDPA, mask [B, 1, T, T]   | variable-length flash attention, flex attention |
| decode step (KV cache)   | SDPA, heads as queries    | SDPA, heads as queries                          |
| prefill after a cache    | SDPA, mask [B, 1, T, S]   | SDPA, mask [B, 1, T, S]                         |

Within documents on CUDA the kernel is one of `DOCUMENT_ATTENTION`: flash attention computes heads of 96 as they are,
where flex attention pads them to 128; flex attention also computes in fp32; SDPA with a dense mask supports everything.

SDPA with a mask computes the masked half as well, so queries are computed in blocks without the keys after them.
Forward and backward on the CPU, in core milliseconds (medians, mean of two runs; B x T = 4,096):

| T, d      | is_causal | mask, at once | mask, in blocks of 256 |
|-----------|-----------|---------------|------------------------|
| 256, 32   |        48 |            51 |       (a single block) |
| 512, 32   |        93 |           101 |                     76 |
| 1,024, 96 |       440 |           634 |                    404 |
| 2,048, 96 |       737 |         1,267 |                    770 |
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

QUERY_BLOCK = 256
"""Queries per call of SDPA with a mask: 128 is 8% faster at T = 512 and no faster beyond; 512 is slower."""

DOCUMENT_ATTENTION = ("flash", "flex", "dense")
"""Kernels for attention within documents: `torch.nn.attention.varlen` (CUDA from compute capability 8.0, bf16),
`torch.nn.attention.flex_attention` (compiled, on CUDA for its backward pass), or SDPA with a mask."""

MIN_FLEX_HEAD_DIM = 16
"""flex_attention refuses narrower heads on CUDA."""

FLEX_OPTIONS: dict[torch.dtype, dict[str, int]] = {
    torch.bfloat16: {
        "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3,
        "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32, "bwd_num_warps": 8,
        "bwd_num_stages": 2,
    },
    torch.float32: {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 32, "fwd_num_warps": 8, "fwd_num_stages": 1},
}  # fmt: skip
"""Block sizes for heads that flex attention pads to 128, for which it has no tuned configuration. Its defaults in bf16
are forward blocks of 64 x 64 with 4 warps, half of what it uses for 128, and spill 284 bytes of registers per thread
backward on an H100 and 876 on an A100. In fp32 they need 182 kB of shared memory forward, of which an A100 has 167 and
a T4 64. These fit, and spill nothing on an H100 and an A100 (register counts by ptxas)."""


class DocumentOffsets(NamedTuple):
    """The mask of variable-length flash attention: the documents of B windows that are concatenated.

    Attributes:
        cu_seqlens: Cumulative sequence lengths: tokens before each document, int32 [limit + 1]; B * T after the last.
        max_seqlen: T, an upper bound on the length of a document.
    """

    cu_seqlens: Tensor
    max_seqlen: int


Mask = Tensor | BlockMask | DocumentOffsets | None
"""Which keys each query attends to, for `attend`; None: plain causal attention."""


def fastest_document_attention(device_type: str, capability: tuple[int, int], half: bool, head_dim: int) -> str:
    """Return the fastest of `DOCUMENT_ATTENTION` that a device, precision and head dim support.

    Args:
        device_type: cpu or cuda.
        capability: Compute capability of a CUDA device.
        half: True if training computes in bf16.
        head_dim: d.
    """
    # The kernels of FlashAttention 2: Ampere or newer, 16-bit, head dims that are multiples of 8 up to 256.
    if device_type == "cuda" and half and capability >= (8, 0) and head_dim % 8 == 0 and head_dim <= 256:
        return "flash"
    return "flex" if device_type == "cuda" and head_dim >= MIN_FLEX_HEAD_DIM else "dense"


def document_limit(documents: int, before: int = 0) -> int:
    """Return the most documents that flash attention is to allow for in a micro-batch.

    The limit is a shape in the compiled graph, and a new one recompiles. So it stays where it suffices, and else grows
    to a power of two that leaves a margin of half.

    Args:
        documents: Number of documents in a micro-batch.
        before: The limit so far.
    """
    return before if documents <= before else 1 << math.ceil(math.log2(1.5 * documents))


def document_mask(documents: Tensor, kernel: str, document_limit: int | None) -> Mask:
    """Return the mask of attention within documents, for one of `DOCUMENT_ATTENTION`.

    Args:
        documents: Document number of each token [B, T], int32.
        kernel: One of `DOCUMENT_ATTENTION`.
        document_limit: For flash: the most documents in all B windows together.
    """
    if kernel == "flash":
        assert document_limit is not None
        return document_offsets(documents, document_limit)
    return block_mask(documents) if kernel == "flex" else dense_mask(documents)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Mask) -> Tensor:
    """Return softmax(queries @ keys.T / sqrt(d)) @ values over the keys that the mask allows each query.

    Args:
        queries: [B, H, T, d].
        keys, values: [B, K, S, d]; K divides H, and each key head serves H / K consecutive query heads.
        mask: From `document_mask`; or [B, 1, T, S] for SDPA, Boolean or added to the scores. None: a query attends to
            the keys up to its own, or if there is one, to all.

    Returns:
        [B, H, T, d].
    """
    if isinstance(mask, DocumentOffsets):
        return _attend_varlen(queries, keys, values, mask)
    if isinstance(mask, BlockMask):
        options = FLEX_OPTIONS.get(queries.dtype) if 64 < queries.shape[-1] <= 128 else None
        mixed: Tensor = _fused(flex_attention)(
            queries, keys, values, block_mask=mask, enable_gqa=True, kernel_options=options
        )
        return mixed
    if queries.shape[2] == 1:
        return _attend_decode_step(queries, keys, values, mask)
    if mask is None:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    return _attend_in_blocks(queries, keys, values, mask)


def _attend_varlen(queries: Tensor, keys: Tensor, values: Tensor, offsets: DocumentOffsets) -> Tensor:
    """`attend` with variable-length flash attention, which takes the windows concatenated: [B * T, heads, d]."""
    from cucafera.model.flash_attention import attend_within_documents  # imports parts of the compiler

    batch, _, tokens, _ = queries.shape
    queries, keys, values = (heads.transpose(1, 2).flatten(0, 1) for heads in (queries, keys, values))
    mixed = attend_within_documents(queries, keys, values, offsets.cu_seqlens, offsets.max_seqlen)
    windows: Tensor = mixed.unflatten(0, (batch, tokens))
    return windows.transpose(1, 2)


def _attend_decode_step(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """`attend` of one new token, which without a mask attends to all keys.

    The H / K heads that share keys become the queries of one head, so that keys are not repeated in memory: 1.5 times
    the tokens per second of a tiny model on a CPU, together with `linear.linear`.
    """
    batch, heads, _, head_dim = queries.shape
    grouped = queries.view(batch, keys.shape[1], heads // keys.shape[1], head_dim)
    mixed: Tensor = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
    return mixed.reshape(batch, heads, 1, head_dim)


def _attend_in_blocks(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """`attend` with a dense mask, in blocks of queries, each without the keys after its last query."""
    tokens, past = queries.shape[2], keys.shape[2] - queries.shape[2]
    mixed = []
    for start in range(0, tokens, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, tokens)
        visible = past + end
        mixed.append(
            F.scaled_dot_product_attention(
                queries[:, :, start:end],
                keys[:, :, :visible],
                values[:, :, :visible],
                attn_mask=mask[..., start:end, :visible],
                enable_gqa=True,
            )
        )
    return torch.cat(mixed, dim=2)


def document_offsets(documents: Tensor, document_limit: int) -> DocumentOffsets:
    """Return the mask of flash attention, computed on the device.

    Args:
        documents: Document number of each token [B, T], int32.
        document_limit: The most documents in all windows together; more are an index out of range.
    """
    # The number of documents is known only on the device: `nonzero` would wait for it, and its result would have a
    # shape that changes, which recompiles. So the result has a fixed size, and unused entries are empty documents.
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True).flatten()
    positions = torch.arange(starts.numel(), dtype=torch.int32, device=documents.device)
    # Every token writes the start of its document to the entry of that document: always the same value.
    number, start = starts.cumsum(0) - 1, torch.where(starts, positions, 0).cummax(0).values
    empty = torch.full((document_limit,), starts.numel(), dtype=torch.int32, device=documents.device)
    cu_seqlens = F.pad(empty.scatter(0, number, start), (0, 1), value=starts.numel())
    return DocumentOffsets(cu_seqlens, documents.shape[1])


def dense_mask(documents: Tensor) -> Tensor:
    """Return a mask [B, 1, T, T], True where a query attends to a key, from document numbers [B, T]."""
    return (documents[:, None, :, None] == documents[:, None, None, :]).tril()


def block_mask(documents: Tensor) -> BlockMask:
    """Return `dense_mask` as a table of the blocks of 128 x 128 tokens that are not masked completely."""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[batch, query] == documents[batch, key])

    batch_size, tokens = documents.shape
    mask: BlockMask = _fused(create_block_mask)(visible, batch_size, None, tokens, tokens, device=documents.device)
    return mask


def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function compiled: eager flex attention would hold [T, T] matrices."""
    return function if torch.compiler.is_compiling() else _compiled(function)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # On first use: torch.compile imports the compiler, which takes two seconds.
    return torch.compile(function)
