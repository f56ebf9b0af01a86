"""The best value of a knob: a parabola through the losses around the smallest one.

Near its minimum a loss is about quadratic in the logarithm of the learning rate; how sure its place is follows from
what the parabola leaves unexplained, repeated seeds included.
"""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = 2
"""Values on each side of the best that the parabola is fitted to."""
NEGLIGIBLE_NATS = 0.01
"""Losses that differ by less are as good as each other."""


@dataclasses.dataclass(frozen=True)
class Optimum:
    """Where the loss is smallest.

    Attributes:
        best_value: The tried value with the smallest mean loss.
        best_loss: That loss.
        edge: lowest or highest if it is the outermost one that was tried, or else None.
        value: Minimum of the parabola; None where there is none between the values that it was fitted to.
        loss: The parabola there.
        factor: One standard error of `value`, as a factor: it lies between value / factor and value * factor; None if
            there are no more points than a parabola needs.
        points: Losses that it was fitted to.
        as_good: From where to where the parabola lies within NEGLIGIBLE_NATS of its minimum.
        coefficients: Of the parabola in log10 of the value: square, linear, constant.
        fitted: Smallest and largest value that it was fitted to.
    """

    best_value: float
    best_loss: float
    edge: str | None
    value: float | None = None
    loss: float | None = None
    factor: float | None = None
    points: int = 0
    as_good: tuple[float, float] | None = None
    coefficients: tuple[float, float, float] | None = None
    fitted: tuple[float, float] | None = None

    def at(self, value: NDArray[np.float64]) -> NDArray[np.float64]:
        """The parabola at some values."""
        assert self.coefficients is not None
        return np.polyval(np.array(self.coefficients), np.log10(value))


def find_optimum(results: Iterable[tuple[float, float]]) -> Optimum | None:
    """The optimum of (value, loss) pairs; a value may stand in several, with other seeds.

    Returns:
        None if there is no finite loss.
    """
    losses: dict[float, list[float]] = {}
    for value, loss in results:
        if math.isfinite(loss):
            losses.setdefault(value, []).append(loss)
    if not losses:
        return None
    values = sorted(losses)
    means = [sum(losses[value]) / len(losses[value]) for value in values]
    best = min(range(len(values)), key=means.__getitem__)
    edge = None
    if len(values) > 1 and best in (0, len(values) - 1):
        edge = "lowest" if best == 0 else "highest"
    found = Optimum(values[best], means[best], edge)
    around = values[max(0, best - NEIGHBOURS) : best + NEIGHBOURS + 1]
    if len(around) < 3:
        return found
    x = np.log10([value for value in around for _ in losses[value]])
    y = np.array([loss for value in around for loss in losses[value]])
    # Around the middle of the values, so that the sums are of like size.
    middle = float(x.mean())
    design = np.stack([(x - middle) ** 2, x - middle, np.ones_like(x)], axis=1)
    square, linear, constant = (float(c) for c in np.linalg.lstsq(design, y, rcond=None)[0])
    if square <= 0:
        return found
    place = -linear / (2 * square)
    if not x.min() <= middle + place <= x.max():
        return found
    smallest = constant - linear**2 / (4 * square)
    reach = math.sqrt(NEGLIGIBLE_NATS / square)
    return dataclasses.replace(
        found,
        value=10 ** (middle + place),
        loss=smallest,
        factor=_factor(design, y, square, linear, constant),
        points=len(x),
        as_good=(10 ** (middle + place - reach), 10 ** (middle + place + reach)),
        coefficients=(square, linear - 2 * square * middle, constant - linear * middle + square * middle**2),
        fitted=(around[0], around[-1]),
    )


def _factor(
    design: NDArray[np.float64], y: NDArray[np.float64], square: float, linear: float, constant: float
) -> float | None:
    """One standard error of the minimum's place, by the delta method from the covariance of the least squares fit."""
    free = len(y) - 3
    if free < 1:
        return None
    residuals = y - design @ np.array([square, linear, constant])
    covariance = np.linalg.inv(design.T @ design) * float(residuals @ residuals) / free
    gradient = np.array([linear / (2 * square**2), -1 / (2 * square), 0.0])
    return float(10 ** math.sqrt(max(0.0, float(gradient @ covariance @ gradient))))
