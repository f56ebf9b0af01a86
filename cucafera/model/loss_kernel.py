"""Softmax cross-entropy and its gradient in place, as one Triton kernel for CUDA.

C tokens of one chunk, V vocabulary
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 16_384
"""Logits that a program holds at a time, 16 per thread: 32 registers each in bf16, without spilling. With 1,024 threads
per program, two run on a multiprocessor, and the rows of all of them (264 x 128 kB on an H100) stay in the L2 cache
between the two passes. More programs of a smaller size would run at once, and their rows would not fit."""


@triton.jit  # type: ignore[untyped-decorator]
def _cross_entropy_in_place(logits, targets, nats, ignore_index, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Compute the cross-entropy of one row, and replace its logits by softmax minus one-hot; zeros without a target."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * VOCABULARY
    columns = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    if target == ignore_index:
        for start in range(0, VOCABULARY, BLOCK):
            zeros = tl.zeros((BLOCK,), dtype=logits.dtype.element_ty)
            tl.store(logits + start + columns, zeros, mask=start + columns < VOCABULARY)
        tl.store(nats + row, 0.0)
        return
    target_logit = tl.load(logits + target).to(tl.float32)
    # Online softmax (Milakov & Gimelshein, 2018): largest logit and sum of exponentials in one pass.
    largest = -float("inf")
    total = 0.0
    for start in range(0, VOCABULARY, BLOCK):
        index = start + columns
        block = tl.load(logits + index, mask=index < VOCABULARY, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(block, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(block - larger), axis=0)
        largest = larger
    tl.store(nats + row, largest + tl.log(total) - target_logit)
    for start in range(0, VOCABULARY, BLOCK):
        index = start + columns
        block = tl.load(logits + index, mask=index < VOCABULARY, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(block - largest) / total - tl.where(index == target, 1.0, 0.0)
        tl.store(logits + index, gradient.to(logits.dtype.element_ty), mask=index < VOCABULARY)


def cross_entropy_in_place(logits: Tensor, targets: Tensor, nats: Tensor, ignore_index: int) -> None:
    """Write the cross-entropy of each row, and replace the logits by its gradient.

    Computed in fp32; softmax minus one-hot is rounded once, to the dtype of the logits.

    Args:
        logits: [C, V], contiguous, bf16 or fp32; overwritten by d(sum of nats) / d(logits).
        targets: Token ids [C], int32 or int64.
        nats: fp32 [C], overwritten.
        ignore_index: Targets with this value give 0 nats and a zero gradient.
    """
    vocabulary = logits.shape[1]
    block = min(MAX_BLOCK, triton.next_power_of_2(vocabulary))
    with torch.cuda.device_of(logits):
        _cross_entropy_in_place[(len(logits),)](
            logits, targets, nats, ignore_index,
            VOCABULARY=vocabulary, BLOCK=block, num_warps=min(32, max(4, block // 512)),
        )  # fmt: skip
