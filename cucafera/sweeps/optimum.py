"""The best value of a knob: a parabola through the losses around the smallest one.

Near its minimum a loss is about quadratic in the logarithm of the learning rate; how sure its place is follows from
what the parabola leaves unexplained, repeated seeds and its own misfit included.
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
LEAST_BEND = 2.0
"""Standard errors that the bend of a parabola must be above zero, or its minimum is nowhere in particular."""
STUDENT = (1.837, 1.321, 1.197, 1.142, 1.111, 1.091, 1.077, 1.067, 1.059, 1.053)
"""Half the width of the 68% interval of Student's t, for 1, 2, ... degrees of freedom."""


@dataclasses.dataclass(frozen=True)
class Optimum:
    """Where the loss is smallest.

    Attributes:
        best_value: The tried value with the smallest mean loss.
        best_loss: That loss.
        edge: lowest or highest if it is the outermost one that was tried, or else None.
        diverged: The value above it, if that came to no finite loss.
        value: Minimum of the parabola; None where there is none between the values that it was fitted to.
        loss: The parabola there.
        factor: How sure that is: with 68% confidence it lies between value / factor and value * factor. None if there
            are no more points than a parabola needs.
        points: Losses that it was fitted to.
        as_good: From where to where, of the values that it was fitted to, the parabola lies within NEGLIGIBLE_NATS of
            its minimum.
        coefficients: Of the parabola in log10 of the value: square, linear, constant.
        fitted: Smallest and largest value that it was fitted to.
    """

    best_value: float
    best_loss: float
    edge: str | None
    diverged: float | None
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
    tried: set[float] = set()
    for value, loss in results:
        tried.add(value)
        if math.isfinite(loss):
            losses.setdefault(value, []).append(loss)
    if not losses:
        return None
    values = sorted(losses)
    means = [sum(losses[value]) / len(losses[value]) for value in values]
    best = min(range(len(values)), key=means.__getitem__)
    above = [value for value in sorted(tried) if value > values[best]]
    edge = None
    if len(tried) > 1 and values[best] in (min(tried), max(tried)):
        edge = "lowest" if above else "highest"
    found = Optimum(values[best], means[best], edge, above[0] if above and above[0] not in losses else None)
    around = values[max(0, best - NEIGHBOURS) : best + NEIGHBOURS + 1]
    if edge or found.diverged or len(around) < 3:
        return found
    x = np.log10([value for value in around for _ in losses[value]])
    y = np.array([loss for value in around for loss in losses[value]])
    # Around the middle of the values, so that the sums are of like size.
    middle = float(x.mean())
    design = np.stack([(x - middle) ** 2, x - middle, np.ones_like(x)], axis=1)
    square, linear, constant = (float(c) for c in np.linalg.lstsq(design, y, rcond=None)[0])
    covariance = _covariance(design, y, np.array([square, linear, constant]))
    least = 0.0 if covariance is None else LEAST_BEND * math.sqrt(covariance[0, 0])
    if square <= least:
        return found
    place = -linear / (2 * square)
    if not x.min() <= middle + place <= x.max():
        return found
    factor = None
    if covariance is not None:
        # By the delta method: place is -linear / (2 * square).
        gradient = np.array([linear / (2 * square**2), -1 / (2 * square), 0.0])
        factor = float(10 ** (_student(len(y) - 3) * math.sqrt(max(0.0, gradient @ covariance @ gradient))))
    reach = math.sqrt(NEGLIGIBLE_NATS / square)
    low, high = max(x.min(), middle + place - reach), min(x.max(), middle + place + reach)
    return dataclasses.replace(
        found,
        value=10 ** (middle + place),
        loss=constant - linear**2 / (4 * square),
        factor=factor,
        points=len(x),
        as_good=(float(10**low), float(10**high)),
        coefficients=(square, linear - 2 * square * middle, constant - linear * middle + square * middle**2),
        fitted=(around[0], around[-1]),
    )


def _covariance(
    design: NDArray[np.float64], y: NDArray[np.float64], coefficients: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """Of the coefficients of a least squares fit; None if it has no point more than coefficients."""
    free = len(y) - len(coefficients)
    if free < 1:
        return None
    residuals = y - design @ coefficients
    covariance: NDArray[np.float64] = np.linalg.inv(design.T @ design) * float(residuals @ residuals) / free
    return covariance


def _student(free: int) -> float:
    """See STUDENT; beyond it, about 1 + 1 / (2 * degrees of freedom)."""
    return STUDENT[free - 1] if free <= len(STUDENT) else 1 + 1 / (2 * free)
