"""Watch whether the first steps of a session train anything: a fault must not pass for training."""

import torch
from torch import Tensor, nn

from cucafera.training.sharding import whole

WATCHED_STEPS = 3
"""The first gradient of a LoRA matrix is zero as long as the other one is; of no weight are three in a row."""
SAMPLED_ELEMENTS = 256
"""Of each weight that is looked at for a change."""
SMALLEST_LEARNING_RATE = 1e-7
"""Below it, weights in fp32 need not move."""


class FirstSteps:
    """Collects on the device, in the first steps, what says whether weights are trained; reads nothing from it.

    Args:
        model: Its weights are as the session begins with them.
        steps_done: Steps of the run before it.

    Attributes:
        last_step: The last of the run's steps that are watched.
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
        """Whether `fault` may be asked."""
        return self.watched >= WATCHED_STEPS

    def watch(self, learning_rate: float) -> None:
        """Look at the gradients of a step, before they are applied; every process of the job calls it."""
        self.watched += 1
        self._learning_rate = max(self._learning_rate, learning_rate)
        zero = torch.zeros((), device=self.parameters[0].device)
        norms = [zero if weight.grad is None else whole(weight.grad.norm()) for weight in self.parameters]
        is_zero = torch.stack(norms) == 0
        self._always_zero = is_zero if self._always_zero is None else self._always_zero & is_zero

    def fault(self) -> str | None:
        """Say what was not trained in the steps that were watched; waits for the device. None if all was.

        Call it when the update of each of them was applied.
        """
        assert self._always_zero is not None
        untrained = [name for name, zero in zip(self.names, self._always_zero.tolist(), strict=True) if zero]
        if untrained:
            others = f" and {len(untrained) - 1} others" if len(untrained) > 1 else ""
            return f"the gradient of {untrained[0]}{others} was exactly zero in each of the first {self.watched} steps"
        changed = torch.stack(
            [(_sample(weight) != before).any() for weight, before in zip(self.parameters, self._before, strict=True)]
        )
        if self._learning_rate >= SMALLEST_LEARNING_RATE and not changed.any():
            return f"no weight has changed in the first {self.watched} steps, although every update was applied"
        return None


def _sample(parameter: Tensor) -> Tensor:
    """A copy of the first elements that this device has."""
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.detach().flatten()[:SAMPLED_ELEMENTS].clone()
