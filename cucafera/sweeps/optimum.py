"""The best value of a hyperparameter: a parabola through the results around the best one.

Near its minimum a loss is about quadratic in the logarithm of the learning rate. The uncertainty of the minimum follows
from the residuals of the fit, which contain both the noise between seeds and the misfit of the parabola.
"""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

NEIGHBOURS = 2
"""Values on each side of the best that the parabola is fitted to."""
CURVATURE_STANDARD_ERRORS = 2.0
"""Standard errors by which the curvature must exceed zero; otherwise the position of the minimum means nothing."""
STUDENT = (1.837, 1.321, 1.197, 1.142, 1.111, 1.091, 1.077, 1.067, 1.059, 1.053)
"""Half width of the 68% interval of Student's t distribution, for 1, 2, ... degrees of freedom."""


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The value of a hyperparameter with the best score.

    Attributes:
        best_value: The tried value with the best mean score.
        best_score: That mean.
        edge: lowest or highest if it is the outermost value that was tried, else None.
        diverged: The next larger value, if it has no finite score.
        value: Optimum of the parabola; None if there is none within the fitted values.
        score: The parabola at that optimum.
        factor: Uncertainty: with 68% confidence the optimum is between value / factor and value * factor. None if there
            are no more points than a parabola has coefficients.
        points: Number of fitted scores.
        as_good: Smallest and largest of the fitted values at which the parabola is within the negligible difference of
            its optimum.
        coefficients: Of the parabola in log10 of the value: square, linear, constant.
        fitted: Smallest and largest fitted value.
    """

    best_value: float
    best_score: float
    edge: str | None
    diverged: float | None
    value: float | None = None
    score: float | None = None
    factor: float | None = None
    points: int = 0
    as_good: tuple[float, float] | None = None
    coefficients: tuple[float, float, float] | None = None
    fitted: tuple[float, float] | None = None

    def at(self, value: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the parabola at some values of the hyperparameter."""
        assert self.coefficients is not None
        return np.polyval(np.array(self.coefficients), np.log10(value))


def find_optimum(
    results: Iterable[tuple[float, float]], negligible: float = 0.01, direction: str = "lower"
) -> Optimum | None:
    """Return the optimum of (value, score) pairs; a value may occur several times, with different seeds.

    Args:
        results: Values of a hyperparameter, positive, with the scores of their runs.
        negligible: Difference of scores that does not matter.
        direction: lower or higher: which score is better.

    Returns:
        None if no score is finite.
    """
    sign = 1.0 if direction == "lower" else -1.0
    found = _minimum([(value, sign * score) for value, score in results], negligible)
    if found is None or direction == "lower":
        return found
    return dataclasses.replace(
        found,
        best_score=-found.best_score,
        score=None if found.score is None else -found.score,
        coefficients=found.coefficients and (-found.coefficients[0], -found.coefficients[1], -found.coefficients[2]),
    )


def _minimum(results: list[tuple[float, float]], negligible: float) -> Optimum | None:
    scores: dict[float, list[float]] = {}
    for value, score in results:
        if math.isfinite(score):
            scores.setdefault(value, []).append(score)
    if not scores:
        return None
    tried = {value for value, _ in results}
    values = sorted(scores)
    means = [sum(scores[value]) / len(scores[value]) for value in values]
    best = min(range(len(values)), key=means.__getitem__)
    above = [value for value in sorted(tried) if value > values[best]]
    edge = None
    if len(tried) > 1 and values[best] in (min(tried), max(tried)):
        edge = "lowest" if above else "highest"
    found = Optimum(values[best], means[best], edge, above[0] if above and above[0] not in scores else None)
    around = values[max(0, best - NEIGHBOURS) : best + NEIGHBOURS + 1]
    if edge or found.diverged or len(around) < 3:
        return found  # nothing is extrapolated
    x = np.log10([value for value in around for _ in scores[value]])
    y = np.array([score for value in around for score in scores[value]])
    return _with_parabola(found, x, y, negligible)


def _with_parabola(found: Optimum, x: NDArray[np.float64], y: NDArray[np.float64], negligible: float) -> Optimum:
    """Return `found` with the minimum of a least squares parabola, if it has a clear one within the points.

    Args:
        found: The best of the tried values.
        x: log10 of the values.
        y: Their scores; lower is better.
        negligible: See `find_optimum`.
    """
    middle = float(x.mean())  # centred, so that the columns of the fit are close to orthogonal
    degrees_of_freedom = len(y) - 3
    if degrees_of_freedom > 0:
        fit, covariance = np.polyfit(x - middle, y, 2, cov=True)
    else:
        fit, covariance = np.polyfit(x - middle, y, 2), None
    square, linear, constant = (float(coefficient) for coefficient in fit)
    error = 0.0 if covariance is None else math.sqrt(covariance[0, 0])
    if square <= CURVATURE_STANDARD_ERRORS * error:
        return found
    minimum = -linear / (2 * square)
    if not x.min() <= middle + minimum <= x.max():
        return found
    factor = None
    if covariance is not None:
        # Delta method: the variance of minimum(square, linear) = -linear / (2 * square) to first order.
        gradient = np.array([linear / (2 * square**2), -1 / (2 * square), 0.0])
        variance = max(0.0, float(gradient @ covariance @ gradient))
        factor = 10 ** (_student(degrees_of_freedom) * math.sqrt(variance))
    reach = math.sqrt(negligible / square)
    low, high = max(x.min(), middle + minimum - reach), min(x.max(), middle + minimum + reach)
    return dataclasses.replace(
        found,
        value=10 ** (middle + minimum),
        score=constant - linear**2 / (4 * square),
        factor=factor,
        points=len(x),
        as_good=(float(10**low), float(10**high)),
        coefficients=(square, linear - 2 * square * middle, constant - linear * middle + square * middle**2),
        fitted=(float(10 ** x.min()), float(10 ** x.max())),
    )


def _student(degrees_of_freedom: int) -> float:
    """Return the factor of STUDENT; beyond the table, about 1 + 1 / (2 * degrees of freedom)."""
    if degrees_of_freedom <= len(STUDENT):
        return STUDENT[degrees_of_freedom - 1]
    return 1 + 1 / (2 * degrees_of_freedom)
