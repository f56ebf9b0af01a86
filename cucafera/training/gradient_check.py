"""Compare the gradients of a compiled model with those of the same model as it is written, once, before training.

A compiler's fault can leave the loss right and the gradients wrong, without an error: on torch 2.11, an in-place update
of what an autograd.Function returns made every gradient zero (pytorch#180642).

T sequence_length
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from cucafera.data.windows import IGNORED, Batch
from cucafera.model.transformer import Decoder

CHECKED_TOKENS = 512
"""Tokens of one window that have targets: enough for every weight to matter, and few logits."""
MOST_OF_ROUNDING = 4.0
"""The compiled model may be so many times as far from fp32 as the written one is: it rounds elsewhere."""
ALWAYS_ALLOWED = {"bf16": 0.02, "fp32": 0.002}
"""Of the norm of a gradient, by the precision of training: the written model may happen to be close to fp32."""
NOISE = 1e-5
"""Of the norm of all gradients together: one that is zero by mathematics, as those of queries and keys are where every
token is the same, is nothing but rounding, which the order of sums decides."""


def compiled_gradient_fault(model: Decoder, micro_batch: Batch, document_limit: int | None) -> str | None:
    """Say which gradients of a compiled decoder differ from those of the written one by more than rounding.

    Both are compared with fp32, whose distance to the written model says what rounding explains. The written model sees
    the first tokens of one window, and attends with a dense mask; the compiled one sees the whole micro-batch, in which
    no other tokens have targets, so that nothing is compiled for this alone. Weights, gradients and random state stay
    as they are.

    Args:
        model: The decoder, compiled in place, on its device; in the precision that training computes in.
        micro_batch: The first windows that it will train on, [n, T]; some token has a target.
        document_limit: As for `Decoder.forward`.

    Returns:
        A sentence, or None if all is well, or nothing can be said because a gradient in fp32 is not finite.
    """
    row, tokens = _part_with_targets(micro_batch.targets)
    part = (slice(row, row + 1), slice(tokens))
    input_ids, targets = micro_batch.input_ids[part], micro_batch.targets[part]
    documents = None if micro_batch.documents is None else micro_batch.documents[part]
    masked = torch.full_like(micro_batch.targets, IGNORED)
    masked[part] = targets

    def written() -> Tensor:
        hidden = model.forward(input_ids, documents=documents)
        logits = model.logits(hidden).float().flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten().long(), reduction="sum", ignore_index=IGNORED)

    def compiled() -> Tensor:
        loss: Tensor = model(micro_batch.input_ids, masked, micro_batch.documents, document_limit=document_limit)
        return loss

    half = torch.is_autocast_enabled(input_ids.device.type)
    allowed = ALWAYS_ALLOWED["bf16" if half else "fp32"]
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with _as_written(model):
        with _in_fp32(model):
            exact = _gradients(model, written)
        rounding = _distances(_gradients(model, written), exact)
    found = _distances(_gradients(model, compiled), exact)
    norms = torch.stack([gradient.norm() for gradient in exact])
    rows = torch.stack([found, rounding, norms], dim=1).tolist()
    if not all(torch.isfinite(norms).tolist()):
        return None
    noise = NOISE * norms.norm().item()
    wrong = [
        (name, distance / norm if norm else float("inf"), explained / norm if norm else 0.0)
        for name, (distance, explained, norm) in zip(names, rows, strict=True)
        if not distance <= MOST_OF_ROUNDING * explained + allowed * norm + noise
    ]
    if not wrong:
        return None
    name, distance, explained = max(wrong, key=lambda row: row[1])
    return (
        f"{len(wrong)} of {len(names)} gradients of the compiled model are not those of the model as written: that of "
        f"{name} is {distance:.1%} of its size away from fp32, of which rounding explains {explained:.1%}"
    )


def _part_with_targets(targets: Tensor) -> tuple[int, int]:
    """The window with most targets among its first tokens, and how many tokens of it; all, if none has one there."""
    tokens = min(CHECKED_TOKENS, targets.shape[1])
    counts = (targets[:, :tokens] != IGNORED).sum(1)
    if not counts.any():
        tokens = targets.shape[1]
        counts = (targets != IGNORED).sum(1)
    return int(counts.argmax()), tokens


def _gradients(model: Decoder, loss: Callable[[], Tensor]) -> list[Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        found = torch.autograd.grad(loss(), trained, allow_unused=True)
    pairs = zip(found, trained, strict=True)
    return [torch.zeros_like(weight) if gradient is None else gradient for gradient, weight in pairs]


def _distances(gradients: list[Tensor], exact: list[Tensor]) -> Tensor:
    return torch.stack([(one - other).norm() for one, other in zip(gradients, exact, strict=True)])


@contextmanager
def _as_written(model: Decoder) -> Iterator[None]:
    """Within it, documents are masked by the path that needs no compiler and no kernel of its own."""
    attention, model.document_attention = model.document_attention, "dense"
    try:
        yield
    finally:
        model.document_attention = attention


@contextmanager
def _in_fp32(model: Decoder) -> Iterator[None]:
    residual_dtype, model.residual_dtype = model.residual_dtype, None
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        model.residual_dtype = residual_dtype
