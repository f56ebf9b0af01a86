"""Check that the first steps of a session train every weight, since a fault may leave the loss plausible."""

import torch
from torch import Tensor, nn

from cucafera.model.sharded import full_tensor, local_tensor
from cucafera.quantities import number_of

WATCHED_STEPS = 3
"""The gradient of lora_A is zero in the first step, while lora_B is zero. No weight has zero gradients for three."""
SAMPLED_ELEMENTS = 256
"""Elements per weight that are compared before and after."""
MIN_LEARNING_RATE = 1e-7
"""Below it, updates may be lost to fp32 rounding, so that unchanged weights are no fault."""


class FirstSteps:
    """Collect evidence on the device that weights are trained, without waiting for the device until `fault` is called.

    Args:
        model: The model with the weights at the start of the session.
        steps_done: Steps of the run before the session.

    Attributes:
        last_step: Number of the last step that is watched.
    """

    def __init__(self, model: nn.Module, steps_done: int) -> None:
        self.last_step = steps_done + WATCHED_STEPS
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.names = [name for name, _ in trained]
        self.parameters = [parameter for _, parameter in trained]
        self.watched = 0
        self._learning_rate = 0.0
        self._always_zero: Tensor | None = None
        self._before = [_sample(parameter) for parameter in self.parameters]

    @property
    def has_seen_enough(self) -> bool:
        """True when `fault` can be called."""
        return self.watched >= WATCHED_STEPS

    def watch(self, learning_rate: float) -> None:
        """Record which gradients of a step are zero, before they are applied; every process of the job calls it."""
        self.watched += 1
        self._learning_rate = max(self._learning_rate, learning_rate)
        zero = torch.zeros((), device=self.parameters[0].device)
        norms = [zero if weight.grad is None else full_tensor(weight.grad.norm()) for weight in self.parameters]
        is_zero = torch.stack(norms) == 0
        self._always_zero = is_zero if self._always_zero is None else self._always_zero & is_zero

    def fault(self) -> str | None:
        """Return which weights were not trained in the watched steps, or None; waits for the device.

        The update of every watched step must have been applied.
        """
        assert self._always_zero is not None
        untrained = [name for name, zero in zip(self.names, self._always_zero.tolist(), strict=True) if zero]
        if untrained:
            others = f" and {len(untrained) - 1} others" if len(untrained) > 1 else ""
            return (
                f"the gradient of {untrained[0]}{others} was exactly zero in each of the first "
                f"{number_of(self.watched, 'step')}"
            )
        changed = torch.stack(
            [(_sample(weight) != before).any() for weight, before in zip(self.parameters, self._before, strict=True)]
        )
        if self._learning_rate >= MIN_LEARNING_RATE and not changed.any():
            return (
                f"no weight has changed in the first {number_of(self.watched, 'step')}, although every update was "
                "applied"
            )
        return None


def _sample(parameter: Tensor) -> Tensor:
    """Return a copy of the first elements on this device."""
    return local_tensor(parameter).detach().flatten()[:SAMPLED_ELEMENTS].clone()
