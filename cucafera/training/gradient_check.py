"""Compare the gradients of a compiled model with those of eager mode, once, before training.

A compiler bug can leave the loss right and the gradients wrong, without an error: on torch 2.11, an in-place update of
what an autograd.Function returned made every gradient zero (pytorch#180642).

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
"""Tokens of one window that have targets: enough for every weight to matter, with few logits."""
ROUNDING_FACTOR = 4.0
"""Allowed distance of the compiled model from fp32, in multiples of that of eager mode: both round, but elsewhere."""
RELATIVE_TOLERANCE = {"bf16": 0.02, "fp32": 0.002}
"""Distance that is always allowed, as a share of the norm of a gradient: eager mode may happen to be close to fp32."""
NOISE_FLOOR = 1e-5
"""Distance that is always allowed, as a share of the norm of all gradients together: a gradient that is zero in exact
arithmetic, as those of queries and keys are where every token is the same, consists of rounding errors only."""


def compiled_gradient_fault(
    model: Decoder,
    micro_batch: Batch,
    document_limit: int | None,
    cross_entropy: Callable[[Decoder, Batch, int | None], Tensor],
) -> str | None:
    """Return which gradients of a compiled decoder differ from eager mode by more than rounding, or None.

    A fixed tolerance does not work: in bf16, rounding alone moves some gradients by several percent. So both models are
    compared with a third, eager in fp32, and the distance of eager mode in training precision is the scale.

    Eager mode computes the first tokens of one window, with a dense mask, which no compiled kernel takes part in. The
    compiled model computes the complete micro-batch, with targets for the same tokens only: a smaller input would be
    compiled for this check alone. Weights, gradients and random state are unchanged.

    Args:
        model: The decoder, compiled in place, on its device and under the autocast of training.
        micro_batch: The first windows that it will train on, [n, T], with at least one target.
        document_limit: As for `Decoder.forward`.
        cross_entropy: That of the run's objective.

    Returns:
        A sentence; None if all gradients agree, or if a gradient in fp32 is not finite, which the guards handle.
    """
    row, tokens = _part_with_targets(micro_batch.targets)
    part = (slice(row, row + 1), slice(tokens))
    input_ids, targets = micro_batch.input_ids[part], micro_batch.targets[part]
    documents = None if micro_batch.documents is None else micro_batch.documents[part]
    masked = torch.full_like(micro_batch.targets, IGNORED)
    masked[part] = targets

    def eager_loss() -> Tensor:
        # `model.forward` bypasses the compiled `__call__`, and the plain loss bypasses the custom operator.
        hidden = model.forward(input_ids, documents=documents)
        logits = model.logits(hidden).float().flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten().long(), reduction="sum", ignore_index=IGNORED)

    def compiled_loss() -> Tensor:
        return cross_entropy(model, micro_batch._replace(targets=masked), document_limit)

    half = torch.is_autocast_enabled(input_ids.device.type)
    tolerance = RELATIVE_TOLERANCE["bf16" if half else "fp32"]
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with _dense_attention(model):
        with _fp32(model):
            exact = _gradients(model, eager_loss)
        rounding = _distances(_gradients(model, eager_loss), exact)
    distances = _distances(_gradients(model, compiled_loss), exact)
    norms = torch.stack([gradient.norm() for gradient in exact])
    rows = torch.stack([distances, rounding, norms], dim=1).tolist()
    if not all(torch.isfinite(norms).tolist()):
        return None
    noise = NOISE_FLOOR * norms.norm().item()
    wrong = [
        (name, distance / norm if norm else float("inf"), explained / norm if norm else 0.0)
        for name, (distance, explained, norm) in zip(names, rows, strict=True)
        if not distance <= ROUNDING_FACTOR * explained + tolerance * norm + noise  # also where distance is NaN
    ]
    if not wrong:
        return None
    name, distance, explained = max(wrong, key=lambda row: row[1])
    return (
        f"{len(wrong)} of {len(names)} gradients of the compiled model differ from eager mode: that of {name} is "
        f"{distance:.1%} of its norm away from fp32, of which rounding explains {explained:.1%}"
    )


def _part_with_targets(targets: Tensor) -> tuple[int, int]:
    """Return the window with most targets in its first tokens, and the number of tokens to use.

    These are `CHECKED_TOKENS`, or all tokens if no window has a target among its first ones.
    """
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
def _dense_attention(model: Decoder) -> Iterator[None]:
    """Mask documents with a dense mask within the context: it needs neither the compiler nor a special kernel."""
    attention, model.document_attention = model.document_attention, "dense"
    try:
        yield
    finally:
        model.document_attention = attention


@contextmanager
def _fp32(model: Decoder) -> Iterator[None]:
    """Compute in fp32 within the context: no autocast, no TF32, and an fp32 residual stream."""
    residual_dtype, model.residual_dtype = model.residual_dtype, None
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        model.residual_dtype = residual_dtype
