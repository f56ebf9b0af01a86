"""Cross-entropy of a linear head that never holds all the logits.

N tokens, C tokens of one chunk, D hidden, V vocabulary
"""

from typing import Any

import torch
from torch import Tensor

LOGITS_IN_CHUNK = {"cpu": 2**25, "cuda": 2**27}
"""C * V by device. On the CPU that is 512 tokens of a vocabulary of 65,536, as fast as 1,024 and 6% to 15% faster than
256 and 128; and all tokens of a small one. CUDA is not measured."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, chunk_tokens: int | None = None
) -> Tensor:
    """Sum over the valid targets of the cross-entropy of softmax(hidden @ weight.T), in nats.

    Equal to `F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")`, but only the logits of one chunk
    exist at a time, because the gradients are made in the forward pass. Under autocast the matrix products run in its
    dtype; softmax, the sum and the gradient of the weight are in fp32.

    Args:
        hidden: [N, D].
        weight: [V, D].
        targets: Token ids [N], int32 or int64.
        ignore_index: Targets of this value count nothing and give no gradient.
        chunk_tokens: C; None: by the device and the vocabulary.

    Returns:
        An fp32 scalar; 0 if no target is valid.
    """
    chunk_tokens = chunk_tokens or _chunk_tokens(weight)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        arguments = (hidden, weight, targets, ignore_index, chunk_tokens, _dtype(hidden, weight))
        return _LinearCrossEntropy.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
    return linear_scores(hidden, weight, targets, ignore_index, chunk_tokens)[0]


def linear_scores(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """What validation measures, again without all the logits at once; no gradients.

    Args:
        hidden, weight, targets, ignore_index, chunk_tokens: As for `linear_cross_entropy`.

    Returns:
        The cross-entropy summed over the valid targets, an fp32 scalar; and how many of them are the likeliest token,
        an int64 scalar.
    """
    chunk_tokens = chunk_tokens or _chunk_tokens(weight)
    weight = weight.to(_dtype(hidden, weight))
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    for chunk, chunk_targets in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        logits = (chunk.to(weight.dtype) @ weight.T).float()
        valid = chunk_targets != ignore_index
        target_logits = logits.gather(1, torch.where(valid, chunk_targets, 0).long()[:, None])[:, 0]
        loss += torch.where(valid, logits.logsumexp(1) - target_logits, 0).sum()
        correct += (valid & (logits.argmax(1) == chunk_targets)).sum()
    return loss, correct


def token_scores(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """The same token by token, for evaluation.

    Args:
        hidden, weight, chunk_tokens: As for `linear_cross_entropy`.
        targets: Token ids [N], int64; all of them count.

    Returns:
        The cross-entropy of each target in nats, fp32 [N]; and whether it is the likeliest token, bool [N].
    """
    nats, likeliest = [hidden.new_empty(0, dtype=torch.float32)], [targets.new_empty(0, dtype=torch.bool)]
    chunk_tokens = chunk_tokens or _chunk_tokens(weight)
    for chunk, chunk_targets in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        logits = (chunk @ weight.T).float()
        nats.append(logits.logsumexp(1) - logits.gather(1, chunk_targets[:, None])[:, 0])
        likeliest.append(logits.argmax(1) == chunk_targets)
    return torch.cat(nats), torch.cat(likeliest)


def _chunk_tokens(weight: Tensor) -> int:
    return max(1, LOGITS_IN_CHUNK.get(weight.device.type, LOGITS_IN_CHUNK["cuda"]) // len(weight))


def _dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Of the matrix products: autocast's, or that of the weight."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _write_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right, where out is in fp32 and the product may be in bf16."""
    if left.dtype == out.dtype:
        out.addmm_(left, right, beta=0)
    else:
        out.copy_(left @ right)


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right, where out is in fp32 and the product may be in bf16."""
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    else:
        out.add_(left @ right)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes both gradients chunk by chunk beside the loss; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        chunk_tokens: int,
        dtype: torch.dtype,
    ) -> Tensor:
        matrix = weight.to(dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)
        # Beside adapters the weight is frozen: a third of the work is not needed.
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        # One buffer for the logits of all chunks: the CPU would have to fetch fresh pages for each.
        shape = (min(chunk_tokens, hidden.shape[0]), weight.shape[0])
        buffer = torch.empty(shape, dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            chunk = hidden[rows].to(dtype)
            valid = targets[rows] != ignore_index
            index = torch.where(valid, targets[rows], 0).long()[:, None]

            logits = buffer[: chunk.shape[0]]
            _write_product(logits, chunk, matrix.T)
            largest = logits.amax(1, keepdim=True)
            target_logits = logits.gather(1, index)
            exponentials = logits.sub_(largest).exp_()
            total = exponentials.sum(1, keepdim=True)
            nats = largest + total.log() - target_logits
            loss += torch.where(valid[:, None], nats, 0).sum()

            # The gradient of the logits is softmax minus one-hot; rows without a target are zero.
            counts = valid[:, None].float()
            logits_gradient = exponentials.mul_(counts / total).scatter_add_(1, index, -counts).to(dtype)
            hidden_gradient[rows] = logits_gradient @ matrix
            if weight_gradient is not None:
                _add_product(weight_gradient, logits_gradient.T, chunk)
        ctx.save_for_backward(hidden_gradient, None if weight_gradient is None else weight_gradient.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        # In place, for memory. A second backward pass meets autograd's version check and raises.
        if weight_gradient is not None:
            weight_gradient = weight_gradient.mul_(upstream[0])
        return hidden_gradient.mul_(upstream[0]), weight_gradient, None, None, None, None
