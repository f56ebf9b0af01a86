"""Fused linear cross-entropy: the loss of a linear head without holding all logits.

N tokens, C tokens of one chunk, D hidden, V vocabulary

The loss and both of its gradients are computed together, chunk by chunk, in one custom operator. It is opaque to the
compiler, which would keep the logits of all chunks; and on torch 2.11 an in-place update of what an autograd.Function
returns silently makes every gradient zero (pytorch#180642).

Related work: Liger Kernel (Hsu et al., 2024) also computes gradients in the forward pass, but in chunks of 512 tokens,
so that it reads and writes the fp32 gradient of the head 64 times for 32,768 tokens, 26 GB against 3.2 GB in chunks of
4,096. Cut Cross-Entropy (Wijmans et al., 2024) keeps no logits at all and recomputes them in the backward pass, which
is one more product with the head.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

LOGITS_BYTES = {"cpu": 2**27, "cuda": 2**29}
"""Bytes of the logits of one chunk, by device. On the CPU, in fp32, that is 512 tokens of a vocabulary of 65,536, as
fast as 1,024 and 6% to 15% faster than 256 and 128. On CUDA it is 4,096 tokens in bf16: each chunk reads and writes the
fp32 gradient of the head once, 0.4 GB, so smaller chunks move more bytes. The value for CUDA is not measured."""
NONE_IGNORED = -1
"""An `ignore_index` that is no target."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, chunk_tokens: int | None = None
) -> Tensor:
    """Return the cross-entropy of softmax(hidden @ weight.T) summed over the valid targets, in nats.

    Equal to `F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")`, but only the logits of one chunk
    exist at a time, because the gradients are computed in the forward pass. Under autocast the matrix products run in
    its dtype; softmax, the sum and the gradient of the weight are in fp32.

    Args:
        hidden: [N, D].
        weight: [V, D].
        targets: Token ids [N], int32 or int64.
        ignore_index: Targets with this value add no loss and no gradient.
        chunk_tokens: C; None: by device and vocabulary.

    Returns:
        An fp32 scalar; 0 if no target is valid.
    """
    dtype = _dtype(hidden, weight)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        # Cast outside of the operator, so that the compiler fuses the casts of the hidden states and of their gradient
        # into the kernels before and after it.
        hidden = hidden.to(dtype)
        chunk_tokens = chunk_tokens or _chunk_tokens(hidden.device.type, dtype, len(weight))
        arguments = (hidden, weight, targets, ignore_index, chunk_tokens)
        return _LinearCrossEntropy.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]
    return linear_loss_and_accuracy(hidden, weight, targets, ignore_index, chunk_tokens)[0]


def linear_loss_and_accuracy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return summed loss and number of correct predictions, without holding all logits and without gradients.

    Args:
        hidden, weight, targets, ignore_index, chunk_tokens: As for `linear_cross_entropy`.

    Returns:
        The cross-entropy summed over the valid targets in nats, an fp32 scalar; and the number of valid targets that
        are the top-1 prediction, an int64 scalar.
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


def per_token_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return loss and correctness of each token, for evaluation; no gradients.

    Args:
        hidden, weight, chunk_tokens: As for `linear_cross_entropy`.
        targets: Token ids [N], int64, all of them valid.

    Returns:
        The cross-entropy of each target in nats, fp32 [N]; and True where it is the top-1 prediction, bool [N].
    """
    nats, correct = [hidden.new_empty(0, dtype=torch.float32)], [targets.new_empty(0, dtype=torch.bool)]
    chunk_tokens = chunk_tokens or _chunk_tokens(weight.device.type, torch.float32, len(weight))
    for chunk, chunk_targets in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        logits = (chunk @ weight.T).float()
        nats.append(logits.logsumexp(1) - logits.gather(1, chunk_targets[:, None])[:, 0])
        correct.append(logits.argmax(1) == chunk_targets)
    return torch.cat(nats), torch.cat(correct)


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """Return the log-probability of each target under softmax(hidden @ weight.T), in nats, without holding all logits.

    Equal to `-F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")`, for losses that are any function
    of them. Unlike the sum of `linear_cross_entropy`, its gradient has another factor for each token, which is known
    only in the backward pass; there the logits are computed again, chunk by chunk.

    Args:
        hidden: [N, D].
        weight: [V, D].
        targets: Token ids [N], int32 or int64, all of them valid.
        chunk_tokens: C; None: by device and vocabulary.

    Returns:
        [N], fp32.
    """
    dtype = _dtype(hidden, weight)
    chunk_tokens = chunk_tokens or _chunk_tokens(hidden.device.type, dtype, len(weight))
    return _TokenLogprobs.apply(hidden.to(dtype), weight, targets, chunk_tokens)  # type: ignore[no-any-return, no-untyped-call]


class _TokenLogprobs(torch.autograd.Function):
    """The function above."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.chunk_tokens = chunk_tokens
        nats = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for _ in _logits_gradients(hidden, weight.to(hidden.dtype), targets, nats, chunk_tokens, NONE_IGNORED):
            pass
        return nats.neg_()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        matrix = weight.to(hidden.dtype)
        factors = -upstream[0][:, None]
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        nats = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for rows, gradient in _logits_gradients(hidden, matrix, targets, nats, ctx.chunk_tokens, NONE_IGNORED):
            # The factors multiply the narrow matrices, not the logits.
            logits_gradient = gradient.to(hidden.dtype)
            if hidden_gradient is not None:
                hidden_gradient[rows] = (logits_gradient @ matrix) * factors[rows].to(hidden.dtype)
            if weight_gradient is not None:
                _addmm_into(weight_gradient, logits_gradient.T, (hidden[rows] * factors[rows]).to(hidden.dtype))
        return hidden_gradient, None if weight_gradient is None else weight_gradient.to(weight.dtype), None, None


def _logits_gradients(
    hidden: Tensor, matrix: Tensor, targets: Tensor, nats: Tensor, chunk_tokens: int, ignore_index: int
) -> Iterator[tuple[slice, Tensor]]:
    """Write the cross-entropy of each target to `nats` [N]; yield the rows of each chunk, and its logits' gradient.

    That is of the sum of the cross-entropy: softmax minus one-hot, [C, V], valid until the next chunk. `matrix` is the
    weight of the head in the dtype of `hidden`.
    """
    in_place = _cross_entropy_in_place(hidden.device)
    # One buffer for the logits of all chunks: the CPU would fault in new pages for each.
    buffer = hidden.new_empty(
        min(chunk_tokens, len(hidden)), len(matrix), dtype=_logits_dtype(hidden.device.type, hidden.dtype)
    )
    for start in range(0, len(hidden), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        logits = buffer[: len(hidden[rows])]
        _matmul_into(logits, hidden[rows], matrix.T)
        in_place(logits, targets[rows], nats[rows], ignore_index)  # from here on, `logits` holds its gradient
        yield rows, logits


def _chunk_tokens(device_type: str, dtype: torch.dtype, vocabulary: int) -> int:
    """Return C for matrix products in a dtype."""
    return max(
        1,
        LOGITS_BYTES.get(device_type, LOGITS_BYTES["cuda"])
        // (_logits_dtype(device_type, dtype).itemsize * vocabulary),
    )


def _dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of the matrix products: autocast's, or that of the weight."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    """The operator below as a differentiable function.

    Its forward pass computes the gradients too, and the backward pass only multiplies them by the gradient of the
    loss. This is exact, because the loss is the last function before a scalar: its gradients depend on the rest of the
    graph by that one factor.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk_tokens: int
    ) -> Tensor:
        # The backward pass would need the logits, N x V: 4 GB in bf16 for 32,768 tokens and 65,536 entries. With the
        # gradients computed now, each chunk of logits is freed after use, and [N, D] and [V, D] are saved instead.
        # With adapters the weight is frozen, and its gradient, a third of the work, is not computed.
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
        # In place, to save memory. A second backward pass would scale twice; autograd's version check raises instead.
        trained = weight_gradient.mul_(upstream[0]) if ctx.weight_is_trained else None
        return hidden_gradient.mul_(upstream[0]), trained, None, None, None


@torch.library.custom_op("cucafera::linear_cross_entropy", mutates_args=())
def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk_tokens: int, weight_is_trained: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed cross-entropy and its gradients.

    Args:
        hidden: [N, D], in the dtype of the matrix products.
        weight: [V, D], cast to it.
        targets, ignore_index, chunk_tokens: As for `linear_cross_entropy`.
        weight_is_trained: True if the gradient of the weight is needed.

    Returns:
        The loss, an fp32 scalar; the gradient of `hidden`, in its dtype; and that of `weight`, in the weight's dtype,
        accumulated in fp32, empty if it is not needed.
    """
    matrix = weight.to(hidden.dtype)
    # Contiguous whatever the layout of `hidden`, as register_fake declares it to the compiler.
    hidden_gradient = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    weight_gradient = weight.new_zeros(weight.shape if weight_is_trained else (0,), dtype=torch.float32)
    nats = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    for rows, gradient in _logits_gradients(hidden, matrix, targets, nats, chunk_tokens, ignore_index):
        logits_gradient = gradient.to(hidden.dtype)
        torch.mm(logits_gradient, matrix, out=hidden_gradient[rows])
        if weight_is_trained:
            _addmm_into(weight_gradient, logits_gradient.T, hidden[rows])
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
    """Return the peak memory of the operator on a device, in addition to its arguments and results.

    Args:
        hidden, weight, chunk_tokens: Arguments of the operator; only shapes and dtypes matter.
        device_type: cpu or cuda.
    """
    logits = min(chunk_tokens, len(hidden)) * len(weight)
    logits_dtype = _logits_dtype(device_type, hidden.dtype)
    cast = 0 if logits_dtype == hidden.dtype else logits * hidden.dtype.itemsize
    matrix = 0 if weight.dtype == hidden.dtype else weight.numel() * hidden.dtype.itemsize
    return logits * logits_dtype.itemsize + cast + matrix + 4 * len(hidden)


def _logits_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the logits: bf16 on CUDA, whose kernel computes in fp32 in registers, else fp32.

    Without that kernel, every operation would round its result to bf16.
    """
    return dtype if device_type == "cuda" else torch.float32


def _cross_entropy_in_place(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, int], None]:
    if device.type == "cuda":
        from cucafera.model.loss_kernel import cross_entropy_in_place  # Triton is installed with CUDA builds only

        return cross_entropy_in_place
    return _eager_cross_entropy_in_place


def _eager_cross_entropy_in_place(logits: Tensor, targets: Tensor, nats: Tensor, ignore_index: int) -> None:
    """Compute what `loss_kernel.cross_entropy_in_place` does, with PyTorch operations in fp32."""
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


def _matmul_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Write left @ right to out, which may be in fp32 where the product is in bf16."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def _addmm_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to out, which is in fp32 where the factors may be in bf16."""
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    elif out.is_cuda:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)  # accumulates in fp32: no bf16 product is rounded
    else:
        out.add_(left @ right)
