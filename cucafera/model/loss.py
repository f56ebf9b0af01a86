"""Cross-entropy of a linear head that never holds all the logits.

N tokens, C tokens of one chunk, D hidden, V vocabulary

The loss and both of its gradients are computed together, chunk by chunk, by one custom operator. The compiler does not
look into it: it would keep the logits of all chunks, and on torch 2.11 an in-place update of what an autograd.Function
returns makes every gradient zero without a word (pytorch#180642).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LOGITS_BYTES = {"cpu": 2**27, "cuda": 2**29}
"""Of one chunk, by device. On the CPU, in fp32, that is 512 tokens of a vocabulary of 65,536, as fast as 1,024 and 6%
to 15% faster than 256 and 128; and all tokens of a small one. On CUDA it is 4,096 tokens in bf16: a chunk reads and
writes the fp32 gradient of the head once, 0.4 GB, so smaller chunks move more. CUDA is not measured."""


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
    dtype = _dtype(hidden, weight)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        # Cast here, the hidden states are cast where they are made, and their gradient where it is used.
        hidden = hidden.to(dtype)
        chunk_tokens = chunk_tokens or _chunk_tokens(hidden.device.type, dtype, len(weight))
        arguments = (hidden, weight, targets, ignore_index, chunk_tokens)
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
    chunk_tokens = chunk_tokens or _chunk_tokens(weight.device.type, torch.float32, len(weight))
    weight = weight.to(_dtype(hidden, weight))
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    for chunk, chunk_targets in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        logits = (chunk.to(weight.dtype) @ weight.T).float()
        valid = chunk_targets != ignore_index
        target_logits = logits.gather(1, torch.where(valid, chunk_targets, 0).long()[:, None])[:, 0]
        loss = loss + torch.where(valid, logits.logsumexp(1) - target_logits, 0).sum()
        correct = correct + (valid & (logits.argmax(1) == chunk_targets)).sum()
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
    chunk_tokens = chunk_tokens or _chunk_tokens(weight.device.type, torch.float32, len(weight))
    for chunk, chunk_targets in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        logits = (chunk @ weight.T).float()
        nats.append(logits.logsumexp(1) - logits.gather(1, chunk_targets[:, None])[:, 0])
        likeliest.append(logits.argmax(1) == chunk_targets)
    return torch.cat(nats), torch.cat(likeliest)


def _chunk_tokens(device_type: str, dtype: torch.dtype, vocabulary: int) -> int:
    """C, for logits that are kept in a dtype."""
    return max(
        1,
        LOGITS_BYTES.get(device_type, LOGITS_BYTES["cuda"])
        // (_logits_dtype(device_type, dtype).itemsize * vocabulary),
    )


def _dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Of the matrix products: autocast's, or that of the weight."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    """The operator below with its gradients, which the backward pass only scales."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk_tokens: int
    ) -> Tensor:
        # Beside adapters the weight is frozen: a third of the work is not needed.
        loss: Tensor
        loss, hidden_gradient, weight_gradient = _loss_and_gradients(
            hidden, weight, targets, ignore_index, chunk_tokens, ctx.needs_input_grad[1]
        )
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_is_trained = ctx.needs_input_grad[1]
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        # In place, for memory. A second backward pass meets autograd's version check and raises.
        trained = weight_gradient.mul_(upstream[0]) if ctx.weight_is_trained else None
        return hidden_gradient.mul_(upstream[0]), trained, None, None, None


@torch.library.custom_op("cucafera::linear_cross_entropy", mutates_args=())
def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk_tokens: int, weight_is_trained: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed cross-entropy and its gradients.

    Args:
        hidden: [N, D], in the dtype of the matrix products.
        weight: [V, D], cast to it.
        targets, ignore_index, chunk_tokens: As for `linear_cross_entropy`.
        weight_is_trained: Whether its gradient is wanted.

    Returns:
        The loss, an fp32 scalar; the gradient of `hidden`, in its dtype; and that of `weight`, in the weight's dtype,
        added up in fp32; empty if it is not wanted.
    """
    matrix = weight.to(hidden.dtype)
    hidden_gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    weight_gradient = weight.new_zeros(weight.shape if weight_is_trained else (0,), dtype=torch.float32)
    nats = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    in_place = _cross_entropy_in_place(hidden.device)
    # One buffer for the logits of all chunks: the CPU would have to fetch fresh pages for each.
    buffer = hidden.new_empty(
        min(chunk_tokens, len(hidden)), len(weight), dtype=_logits_dtype(hidden.device.type, hidden.dtype)
    )
    for start in range(0, len(hidden), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        chunk = hidden[rows]
        logits = buffer[: len(chunk)]
        _write_product(logits, chunk, matrix.T)
        in_place(logits, targets[rows], nats[rows], ignore_index)
        logits_gradient = logits.to(hidden.dtype)
        torch.mm(logits_gradient, matrix, out=hidden_gradient[rows])
        if weight_is_trained:
            _add_product(weight_gradient, logits_gradient.T, chunk)
    return nats.sum(), hidden_gradient, weight_gradient.to(weight.dtype)


@_loss_and_gradients.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk_tokens: int, weight_is_trained: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((), dtype=torch.float32),
        torch.empty_like(hidden, memory_format=torch.contiguous_format),
        weight.new_empty(weight.shape if weight_is_trained else (0,)),
    )


def workspace_bytes(hidden: Tensor, weight: Tensor, chunk_tokens: int, device_type: str) -> int:
    """Memory that the operator takes at its peak on a device, beside what it is given and returns.

    Args:
        hidden, weight, chunk_tokens: What the operator is given; only shapes and dtypes matter.
        device_type: cpu or cuda.
    """
    logits = min(chunk_tokens, len(hidden)) * len(weight)
    logits_dtype = _logits_dtype(device_type, hidden.dtype)
    cast = 0 if logits_dtype == hidden.dtype else logits * hidden.dtype.itemsize
    matrix = 0 if weight.dtype == hidden.dtype else weight.numel() * hidden.dtype.itemsize
    return logits * logits_dtype.itemsize + cast + matrix + 4 * len(hidden)


def _logits_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The kernel of CUDA computes in fp32 from bf16 in registers; operation by operation, each would be rounded."""
    return dtype if device_type == "cuda" else torch.float32


def _cross_entropy_in_place(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, int], None]:
    if device.type == "cuda":
        from cucafera.model.loss_kernel import cross_entropy_in_place  # Triton is there with CUDA only

        return cross_entropy_in_place
    return _cross_entropy_in_parts


def _cross_entropy_in_parts(logits: Tensor, targets: Tensor, nats: Tensor, ignore_index: int) -> None:
    """What the kernel for CUDA does (see `loss_kernel.cross_entropy_in_place`), by PyTorch's operations, in fp32."""
    valid = (targets != ignore_index)[:, None]
    index = torch.where(valid[:, 0], targets, 0).long()[:, None]
    largest = logits.amax(1, keepdim=True)
    target_logits = logits.gather(1, index)
    exponentials = logits.sub_(largest).exp_()
    total = exponentials.sum(1, keepdim=True)
    nats.copy_(torch.where(valid, largest + total.log() - target_logits, 0)[:, 0])
    # Softmax minus one-hot; rows without a target are zero.
    counts = valid.float()
    exponentials.mul_(counts / total).scatter_add_(1, index, -counts)


def _write_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right, where out may be in fp32 and the product in bf16."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += left @ right, where out is in fp32 and the factors may be in bf16."""
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    elif out.is_cuda:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)  # without a bf16 product in between
    else:
        out.add_(left @ right)
