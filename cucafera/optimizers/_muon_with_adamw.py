"""The optimizer behind `optimizer=muon`.

B matrices of one shape, O outputs (rows), I inputs (columns)
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from cucafera.model.sharded import full_tensor, local_tensor, sharded

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration (Jordan et al., 2024): singular values end between 0.7 and 1.2 rather than at 1, in few
iterations."""
ITERATIONS = 5
ROW_DECAY = 0.95
"""Decay of the running square of the rows of an update (Li et al., 2025, NorMuon)."""
BATCH_ELEMENTS = 2**26
"""Most elements of the matrices that are orthogonalized at once: 256 MiB per fp32 copy."""


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the groups that have a `momentum`, AdamW for the others.

    Muon: with the gradient G and the momentum M of a matrix of O outputs and I inputs,

        M <- momentum * M + (1 - momentum) * G
        U  = orthogonalized(momentum * M + (1 - momentum) * G)      Nesterov
        W <- W - lr * sqrt(max(1, O / I)) * U

    so that the spectral norm of an update of W, as seen by inputs and outputs of unit size per element, is lr at every
    width (Jordan et al., 2024; Bernstein, 2025). With `row_normalization` each row of U is divided by the running root
    mean square of its elements, and U then scaled to its former norm (NorMuon, Li et al., 2025). The weight decay is
    decoupled; if it is `cautious`, it applies only to elements whose update and weight have one sign (Chen et al.,
    2025).

    Where the attribute `found_inf`, a tensor of one element, is 1, a step leaves weights and state as they were, bit
    for bit, and does not wait for the device to know.

    Weights may be DTensors that are sharded by rows. Each process then gathers the update of a matrix, orthogonalizes
    it and keeps its own rows; momenta stay sharded. Without sharding, every process computes all updates.

    Args:
        groups: Parameter groups. Muon's have `momentum`, `cautious`, `row_normalization` and matrices only.
        lr: Learning rate of groups without one.
        betas: AdamW's.
        eps: AdamW's.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        # `fused` makes load_state_dict keep AdamW's step counts on the device.
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step with the gradients that the parameters have; those without are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        is_nonfinite = None if self.found_inf is None else self.found_inf > 0
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if "momentum" in group:
                for batch in _batches_of_one_shape(parameters):
                    self._step_matrices(batch, group, is_nonfinite)
            elif parameters:
                self._step_others(parameters, group)
        return loss

    def _step_matrices(self, weights: Sequence[Tensor], group: dict[str, Any], is_nonfinite: Tensor | None) -> None:
        """Take Muon's step for matrices of one shape."""
        states = [self._matrix_state(weight, group["row_normalization"]) for weight in weights]
        outputs, inputs = weights[0].shape
        gradients = torch.stack(
            [local_tensor(weight.grad) for weight in weights if weight.grad is not None]
        )  # [B, O, I], O of this process
        former = torch.stack([local_tensor(state["momentum"]) for state in states])
        gradients = _unless(is_nonfinite, gradients, torch.zeros_like(gradients))
        momenta = former.lerp(gradients, 1 - group["momentum"])
        directions = gradients.lerp_(momenta, group["momentum"])
        momenta = _unless(is_nonfinite, momenta, former)
        torch._foreach_copy_([local_tensor(state["momentum"]) for state in states], list(momenta))

        updates = orthogonalized(_gathered(directions, weights))
        if group["row_normalization"]:
            squares = torch.stack([full_tensor(state["row_square"]) for state in states])
            updates, new_squares = row_normalized(updates, squares)
            _keep_own_rows([state["row_square"] for state in states], _unless(is_nonfinite, new_squares, squares))
        scale = group["lr"] * max(1.0, outputs / inputs) ** 0.5
        updates = _own_rows(updates, weights).mul_(scale)
        old = torch.stack([local_tensor(weight) for weight in weights])
        decay = group["lr"] * group["weight_decay"]
        decayed = torch.where(updates * old > 0, old * decay, 0.0) if group["cautious"] else old * decay
        new = _unless(is_nonfinite, old - decayed - updates, old)
        torch._foreach_copy_([local_tensor(weight) for weight in weights], list(new))

    def _matrix_state(self, weight: Tensor, row_normalization: bool) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        if row_normalization and "row_square" not in state:
            state["row_square"] = torch.zeros_like(weight).sum(dim=1, keepdim=True)  # sharded like the weight
        return state

    def _step_others(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Take AdamW's step, in one fused kernel; the state is that of torch.optim.AdamW."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        first, second = group["betas"]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=first,
            beta2=second,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return matrices with the same singular vectors and singular values near 1, by Newton-Schulz iterations.

    In bf16 on CUDA, where five iterations in fp32 would cost several times as much and change nothing measurable
    (Jordan et al., 2024), and in fp32 on a CPU, which is slower in bf16.

    Args:
        matrices: [B, O, I].

    Returns:
        [B, O, I] in fp32; zeros for a matrix of zeros.
    """
    linear, cubic, quintic = COEFFICIENTS
    x = matrices / (torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True) + 1e-7)
    x = x.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT.contiguous()
    for _ in range(ITERATIONS):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=cubic, alpha=quintic)
        x = torch.baddbmm(x, polynomial, x, beta=linear)
    result: Tensor = (x.mT if is_tall else x).float()
    return result


def row_normalized(updates: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each row by the running root mean square of its elements, and keep the norm of each matrix.

    The running mean starts at zero. The bias of its first steps is the same for all rows, so that the norm removes it.

    Args:
        updates: [B, O, I].
        squares: Running mean squares [B, O, 1].

    Returns:
        The updates and the new mean squares.
    """
    squares = squares.lerp(updates.square().mean(dim=2, keepdim=True), 1 - ROW_DECAY)
    norms = torch.linalg.vector_norm(updates, dim=(1, 2), keepdim=True)
    updates = updates * (squares + 1e-12).rsqrt()
    new_norms = torch.linalg.vector_norm(updates, dim=(1, 2), keepdim=True)
    return updates * (norms / (new_norms + 1e-7)), squares


def _batches_of_one_shape(parameters: Iterable[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Yield matrices of one shape together, in batches of at most BATCH_ELEMENTS."""
    by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        by_shape[parameter.shape].append(parameter)
    for shape, alike in by_shape.items():
        size = max(1, BATCH_ELEMENTS // shape.numel())
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def _unless(is_nonfinite: Tensor | None, new: Tensor, former: Tensor) -> Tensor:
    """Return new values, or the former ones if a tensor on the device says so."""
    return new if is_nonfinite is None else torch.where(is_nonfinite, former, new)


def _gathered(parts: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return complete matrices [B, O, I] from the rows [B, o, I] that each process has of them."""
    if not isinstance(weights[0], DTensor):
        return parts
    whole = []
    for part, weight in zip(parts, weights, strict=True):
        assert isinstance(weight, DTensor)
        matrix = DTensor.from_local(
            part, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )
        whole.append(matrix.full_tensor())
    return torch.stack(whole)


def _own_rows(matrices: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return the rows [B, o, I] that this process has, of complete matrices [B, O, I]."""
    first = weights[0]
    if not isinstance(first, DTensor):
        return matrices
    return torch.stack([sharded(matrix, first.device_mesh, first.placements).to_local() for matrix in matrices])


def _keep_own_rows(targets: Sequence[Tensor], values: Tensor) -> None:
    """Copy complete values [B, O, ...] into tensors, or into the rows of them that this process has."""
    torch._foreach_copy_([local_tensor(target) for target in targets], list(_own_rows(values, targets)))
