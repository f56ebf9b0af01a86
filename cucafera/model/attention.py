"""Causal attention within documents, by the kernel that suits the device. All give the same numbers.

B batch, T new tokens, S tokens so far (T of them new), H heads, K key/value heads, d head dim

| what is asked         | CPU                       | CUDA                                |
|-----------------------|---------------------------|-------------------------------------|
| causal                | SDPA, is_causal           | SDPA, is_causal                     |
| causal, in documents  | SDPA, mask [B, 1, T, T]   | flex_attention, which skips blocks  |
| one token of a cache  | SDPA, heads as queries    | SDPA, heads as queries              |
| more, or padded texts | SDPA, mask [(B, 1,) T, S] | SDPA, mask [(B, 1,) T, S]           |

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
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

QUERY_BLOCK = 256
"""Queries of one call of SDPA with a mask: 128 gains 8% at T = 512 and nothing beyond; 512 is slower."""

Mask = Tensor | BlockMask | None
"""What `attend` needs to know of who sees whom; None: every token sees itself and all before it."""


def attention_mask(
    tokens: int, past: int, documents: Tensor | None, padding: Tensor | None, device: torch.device
) -> Mask:
    """The mask of one forward pass, made once and shared by all layers.

    Args:
        tokens: T, new tokens.
        past: Tokens before them in the cache (S - T); 0 when there are documents.
        documents: Document number of each token [B, T], int32, or None: all tokens are of one document.
        padding: How many tokens at the beginning of each text nobody sees but padding itself, [B]; None: there is none.
        device: Where attention will run.

    Returns:
        A mask for `attend`.
    """
    if documents is not None:
        return block_mask(documents) if device.type == "cuda" else dense_mask(documents)
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
    if isinstance(mask, BlockMask):
        return _fused(flex_attention)(queries, keys, values, block_mask=mask, enable_gqa=True)  # type: ignore[no-any-return]
    if mask is None and queries.shape[2] == 1:
        return _attend_with_one(queries, keys, values)
    if mask is None:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    return _attend_in_blocks(queries, keys, values, mask)


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
