"""Causal attention within documents, by the kernel that suits the device. All give the same numbers.

B batch, T new tokens, S tokens so far (T of them new), H heads, K key/value heads, d head dim

| what is asked         | CPU                       | CUDA                                            |
|-----------------------|---------------------------|-------------------------------------------------|
| causal                | SDPA, is_causal           | SDPA, is_causal                                 |
| causal, in documents  | SDPA, mask [B, 1, T, T]   | variable-length flash attention, flex attention |
| one token of a cache  | SDPA, heads as queries    | SDPA, heads as queries                          |
| more, or padded texts | SDPA, mask [(B, 1,) T, S] | SDPA, mask [(B, 1,) T, S]                       |

Within documents on CUDA it is one of `DOCUMENT_ATTENTION`: flash attention computes heads of 96 as they are, where flex
attention pads them to 128; flex attention also takes fp32; the dense mask takes everything.

SDPA with a mask computes the masked half as well, so queries go in blocks that are given no keys after them. Forward
and backward on the CPU, in core milliseconds (medians, mean of two runs; B x T = 4,096):

| T, d      | is_causal | mask, at once | mask, in blocks of 256 |
|-----------|-----------|---------------|------------------------|
| 256, 32   |        48 |            51 |           the same one |
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
"""Queries of one call of SDPA with a mask: 128 gains 8% at T = 512 and nothing beyond; 512 is slower."""

DOCUMENT_ATTENTION = ("flash", "flex", "dense")
"""What computes attention within documents: `torch.nn.attention.varlen` (CUDA from compute capability 8.0, bf16),
`torch.nn.attention.flex_attention` (compiled, on CUDA for its backward pass), or SDPA with a mask."""

SMALLEST_FLEX_HEAD = 16
"""flex_attention refuses narrower heads on CUDA."""

FLEX_OPTIONS: dict[torch.dtype, dict[str, int]] = {
    torch.bfloat16: {
        "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3,
        "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32, "bwd_num_warps": 8,
        "bwd_num_stages": 2,
    },
    torch.float32: {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 32, "fwd_num_warps": 8, "fwd_num_stages": 1},
}  # fmt: skip
"""For heads that flex attention pads to 128. It has no choice of its own for heads of 96. In bf16 it would take forward
blocks of 64 x 64 with 4 warps, half the warps of what it takes for 128, and spill 284 bytes of registers per thread
backward on an H100 and 876 on an A100. In fp32 it would ask for 182 kB of shared memory forward, of which an A100 has
167 and a T4 64. These fit, and spill nothing on an H100 and an A100, as ptxas counts."""


class DocumentLengths(NamedTuple):
    """The mask of flash attention: where documents begin and end in a micro-batch of B windows, end to end.

    Attributes:
        cumulative: Tokens before each document, int32 [limit + 1]; B * T behind the last one.
        longest: T, tokens that no document exceeds.
    """

    cumulative: Tensor
    longest: int


Mask = Tensor | BlockMask | DocumentLengths | None
"""What `attend` needs to know of who sees whom; None: every token sees itself and all before it."""


def document_attention(device_type: str, capability: tuple[int, int], half: bool, head_dim: int) -> str:
    """The fastest of `DOCUMENT_ATTENTION` that a device, precision and head can have.

    Args:
        device_type: cpu or cuda.
        capability: Of a CUDA device.
        half: Whether training computes in bf16.
        head_dim: d.
    """
    if device_type == "cuda" and half and capability >= (8, 0) and head_dim % 8 == 0 and head_dim <= 256:
        return "flash"
    return "flex" if device_type == "cuda" and head_dim >= SMALLEST_FLEX_HEAD else "dense"


def document_limit(documents: int, before: int = 0) -> int:
    """Documents to make room for in a micro-batch, for flash attention.

    Another limit is compiled again, so it is kept where it suffices, and else raised to a power of two with half as
    much to spare.

    Args:
        documents: That a micro-batch has.
        before: The limit so far.
    """
    return before if documents <= before else 1 << math.ceil(math.log2(1.5 * documents))


def document_mask(documents: Tensor, kernel: str, document_limit: int | None) -> Mask:
    """The mask of attention within documents, for one of `DOCUMENT_ATTENTION`.

    Args:
        documents: Document number of each token [B, T], int32.
        kernel: Which.
        document_limit: For flash: documents that there may be in the B windows.
    """
    if kernel == "flash":
        assert document_limit is not None
        return document_lengths(documents, document_limit)
    return block_mask(documents) if kernel == "flex" else dense_mask(documents)


def attention_mask(tokens: int, past: int, padding: Tensor | None, device: torch.device) -> Tensor | None:
    """The mask of one forward pass of texts of one document each, made once and shared by all layers.

    Args:
        tokens: T, new tokens.
        past: Tokens before them in the cache (S - T).
        padding: How many tokens at the beginning of each text nobody sees but padding itself, [B]; None: there is none.
        device: Where attention will run.

    Returns:
        A mask for `attend`.
    """
    if padding is not None:
        keys = torch.arange(past + tokens, device=device)
        queries = keys[past:, None]
        # Padding sees itself: a row without any key would be NaN.
        visible = (keys >= padding[:, None, None]) | (keys == queries)
        mask: Tensor = (visible & (keys <= queries))[:, None]
        return mask
    if past and tokens > 1:
        return torch.ones(tokens, past + tokens, dtype=torch.bool, device=device).tril(past)
    return None


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Mask) -> Tensor:
    """softmax(queries @ keys.T / sqrt(d)) @ values over what the mask lets each query see.

    Args:
        queries: [B, H, T, d].
        keys, values: [B, K, S, d]; K divides H, and each of them serves H / K heads in a row.
        mask: From `attention_mask`.

    Returns:
        [B, H, T, d].
    """
    if isinstance(mask, DocumentLengths):
        return _attend_end_to_end(queries, keys, values, mask)
    if isinstance(mask, BlockMask):
        options = FLEX_OPTIONS.get(queries.dtype) if 64 < queries.shape[-1] <= 128 else None
        mixed: Tensor = _fused(flex_attention)(
            queries, keys, values, block_mask=mask, enable_gqa=True, kernel_options=options
        )
        return mixed
    if mask is None and queries.shape[2] == 1:
        return _attend_with_one(queries, keys, values)
    if mask is None:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    return _attend_in_blocks(queries, keys, values, mask)


def _attend_end_to_end(queries: Tensor, keys: Tensor, values: Tensor, lengths: DocumentLengths) -> Tensor:
    """`attend` by flash attention, for which the windows stand end to end: [B * T, heads, d]."""
    from cucafera.model.flash_attention import attend_within_documents  # loads parts of the compiler

    batch, _, tokens, _ = queries.shape
    queries, keys, values = (heads.transpose(1, 2).flatten(0, 1) for heads in (queries, keys, values))
    mixed = attend_within_documents(queries, keys, values, lengths.cumulative, lengths.longest)
    windows: Tensor = mixed.unflatten(0, (batch, tokens))
    return windows.transpose(1, 2)


def _attend_with_one(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`attend` of one new token that sees all keys. The heads that share keys are the queries of one head."""
    batch, heads, _, head_dim = queries.shape
    grouped = queries.view(batch, keys.shape[1], heads // keys.shape[1], head_dim)
    mixed: Tensor = F.scaled_dot_product_attention(grouped, keys, values)
    return mixed.reshape(batch, heads, 1, head_dim)


def _attend_in_blocks(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """`attend` with a dense mask; no block of queries is given keys that come after all of it."""
    tokens, past = queries.shape[2], keys.shape[2] - queries.shape[2]
    mixed = []
    for start in range(0, tokens, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, tokens)
        seen = past + end
        mixed.append(
            F.scaled_dot_product_attention(
                queries[:, :, start:end],
                keys[:, :, :seen],
                values[:, :, :seen],
                attn_mask=mask[..., start:end, :seen],
                enable_gqa=True,
            )
        )
    return torch.cat(mixed, dim=2)


def document_lengths(documents: Tensor, document_limit: int) -> DocumentLengths:
    """The mask of flash attention, made on the device and of one size, so that nothing waits and nothing is recompiled.

    Args:
        documents: Document number of each token [B, T], int32.
        document_limit: Documents that there may be in all windows together; more are an index out of range.
    """
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True).flatten()
    places = torch.arange(begins.numel(), dtype=torch.int32, device=documents.device)
    # Every token writes where its document begins, to the place of that document: always the same value.
    number, begin = begins.cumsum(0) - 1, torch.where(begins, places, 0).cummax(0).values
    no_tokens = torch.full((document_limit,), begins.numel(), dtype=torch.int32, device=documents.device)
    cumulative = F.pad(no_tokens.scatter(0, number, begin), (0, 1), value=begins.numel())
    return DocumentLengths(cumulative, documents.shape[1])


def dense_mask(documents: Tensor) -> Tensor:
    """True where a token sees another, [B, 1, T, T], from document numbers [B, T]."""
    return (documents[:, None, :, None] == documents[:, None, None, :]).tril()


def block_mask(documents: Tensor) -> BlockMask:
    """The same as `dense_mask`, as a table of the blocks of 128 x 128 tokens that are not wholly masked."""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[batch, query] == documents[batch, key])

    batch_size, tokens = documents.shape
    mask: BlockMask = _fused(create_block_mask)(visible, batch_size, None, tokens, tokens, device=documents.device)
    return mask


def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled form of a function that would otherwise hold [T, T] matrices."""
    return function if torch.compiler.is_compiling() else _compiled(function)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Made when it is needed: torch.compile loads the compiler, which takes two seconds.
    return torch.compile(function)
