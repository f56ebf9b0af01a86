"""The best value of a hyperparameter: a parabola through the best value and its neighbours, with an honest uncertainty.

Near its minimum a loss is about quadratic in the logarithm of the learning rate; further away it is not: too high a
rate costs more than too low a one. So the position of the minimum is that of a parabola through the best value and the
two next to it, or all within a factor of two. Its uncertainty comes from a second parabola, through twice as many,
whose residuals contain the noise between seeds and the misfit of the shape.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

NARROW, WIDE = (2.0, 1), (4.0, 2)
"""Values that the narrow and the wide parabola are fitted to: those within a factor of the best, and at least so many
on each side of it."""
CURVATURE_STANDARD_ERRORS = 1.0
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
        is_flat: True if all values have a score, and no two of them differ by more than the negligible difference.
        value: Optimum of the narrow parabola; None if the results have no clear one.
        score: The parabola at that optimum.
        interval: With 68% confidence the optimum is between these values. None if there are only three scores.
        points: Number of scores that the interval follows from.
        misfit: Standard deviation of the mean scores around the wide parabola: noise and misfit, in the unit of the
            score. None without an interval.
        as_good: Smallest and largest of the fitted values at which the narrow parabola is within `resolved` of its
            optimum.
        resolved: The smallest difference of scores that means anything: the negligible one, or a larger misfit.
        coefficients: Of the narrow parabola in log10 of the value: square, linear, constant.
        fitted: Smallest and largest value that the narrow parabola is fitted to.
    """

    best_value: float
    best_score: float
    edge: str | None
    diverged: float | None
    is_flat: bool = False
    value: float | None = None
    score: float | None = None
    interval: tuple[float, float] | None = None
    points: int = 0
    misfit: float | None = None
    as_good: tuple[float, float] | None = None
    resolved: float = 0.0
    coefficients: tuple[float, float, float] | None = None
    fitted: tuple[float, float] | None = None

    def at(self, value: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the narrow parabola at some values of the hyperparameter."""
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
    is_flat = len(values) == len(tried) > 1 and max(means) - min(means) <= negligible
    diverged = above[0] if above and above[0] not in scores else None
    found = Optimum(values[best], means[best], None if is_flat else edge, diverged, is_flat)
    nearest = _window(values, best, *NARROW)
    if is_flat or edge or found.diverged or len(nearest) < 3:
        return found  # nothing is extrapolated
    around = {value: scores[value] for value in _window(values, best, *WIDE)}
    return _with_parabola(found, around, nearest, negligible)


def _window(values: Sequence[float], best: int, factor: float, fewest: int) -> list[float]:
    """Return the values, sorted, within a factor of the best, and at least so many on each side, if there are."""
    return [
        value
        for number, value in enumerate(values)
        if abs(number - best) <= fewest or abs(math.log(value / values[best])) < math.log(factor) + 1e-6
    ]


class _Parabola(NamedTuple):
    """A least squares parabola.

    Attributes:
        square, linear, constant: Its coefficients.
        minimum: Where it is lowest, if `square` is positive.
        influence: Derivative of `minimum` with respect to each score (delta method).
        inverse: Inverse of the normal matrix: the covariance of the coefficients for scores of variance 1.
    """

    square: float
    linear: float
    constant: float
    minimum: float
    influence: NDArray[np.floating[Any]]
    inverse: NDArray[np.floating[Any]]


def _parabola(x: NDArray[np.float64], y: NDArray[np.float64]) -> _Parabola:
    columns = np.vander(x, 3)
    inverse = np.linalg.inv(columns.T @ columns)
    weights = inverse @ columns.T
    square, linear, constant = (float(coefficient) for coefficient in weights @ y)
    if square <= 0:
        return _Parabola(square, linear, constant, math.nan, np.full(len(x), math.nan), inverse)
    gradient = np.array([linear / (2 * square**2), -1 / (2 * square), 0.0])  # of -linear / (2 * square)
    return _Parabola(square, linear, constant, -linear / (2 * square), gradient @ weights, inverse)


def _with_parabola(
    found: Optimum, scores: Mapping[float, Sequence[float]], nearest: Sequence[float], negligible: float
) -> Optimum:
    """Return `found` with the minimum of a narrow parabola, if a wide one has a clear minimum within the values.

    Both are fitted to the mean score of each value, since seeds average the noise and not the misfit of the shape. Let
    a be the minimum of the narrow parabola, b that of the wide one, s the residual standard deviation of the wide one,
    and e(p) = t * s * |dp/dy| the error of a minimum p by the delta method (Seber and Wild, 1989, Nonlinear Regression,
    section 5.1), t the 68% quantile of Student's distribution. The interval is the smallest that holds b +- e(b) and
    a +- (e(a) + |a - b|): the shift of the minimum between the two windows is taken for a systematic error of the same
    size. It covers the minimum of the true curve in at least 68% of the cases that tests/sweeps/test_optimum.py
    simulates: parabolas, asymmetric and pointed curves, with little noise and with much.

    Args:
        found: The best of the tried values.
        scores: The scores of the values around it, lower is better; at least three values, sorted.
        nearest: The values of the narrow parabola.
        negligible: See `find_optimum`.
    """
    x = np.log10(list(scores))
    y = np.array([sum(each) / len(each) for each in scores.values()])
    is_near = np.isin(list(scores), nearest)
    middle = float(x.mean())  # centred, so that the columns of the fit are close to orthogonal
    wide, narrow = _parabola(x - middle, y), _parabola(x[is_near] - middle, y[is_near])
    misfit, degrees_of_freedom = _misfit(wide, x - middle, y, list(scores.values()))
    error = 0.0 if misfit is None else misfit * math.sqrt(wide.inverse[0, 0])
    if wide.square <= CURVATURE_STANDARD_ERRORS * error or narrow.square <= 0:
        return found
    near = x[is_near]
    if not (x.min() <= middle + wide.minimum <= x.max() and near.min() <= middle + narrow.minimum <= near.max()):
        return found
    interval = None
    if misfit is not None:
        errors = [
            _student(degrees_of_freedom) * misfit * float(np.linalg.norm(fit.influence)) for fit in (narrow, wide)
        ]
        reach = errors[0] + abs(narrow.minimum - wide.minimum)
        low = min(narrow.minimum - reach, wide.minimum - errors[1])
        high = max(narrow.minimum + reach, wide.minimum + errors[1])
        interval = (float(10 ** max(middle + low, x.min())), float(10 ** min(middle + high, x.max())))
    resolved = max(negligible, misfit or 0.0)
    reach = math.sqrt(resolved / narrow.square)
    square, linear, constant = narrow.square, narrow.linear, narrow.constant
    position = middle + narrow.minimum
    return dataclasses.replace(
        found,
        value=10**position,
        score=constant - linear**2 / (4 * square),
        interval=interval,
        points=sum(map(len, scores.values())),
        misfit=misfit,
        as_good=(float(10 ** max(near.min(), position - reach)), float(10 ** min(near.max(), position + reach))),
        resolved=resolved,
        coefficients=(square, linear - 2 * square * middle, constant - linear * middle + square * middle**2),
        fitted=(float(10 ** near.min()), float(10 ** near.max())),
    )


def _misfit(
    wide: _Parabola, x: NDArray[np.float64], means: NDArray[np.float64], scores: Sequence[Sequence[float]]
) -> tuple[float | None, int]:
    """Return the standard deviation of mean scores around the wide parabola, and its degrees of freedom.

    Three values leave no residuals: there it is that of the seeds, divided by the root of their number. None without.
    """
    if len(means) > 3:
        residuals = means - np.polyval([wide.square, wide.linear, wide.constant], x)
        return math.sqrt(float(residuals @ residuals) / (len(means) - 3)), len(means) - 3
    count = sum(map(len, scores))
    if count == len(means):
        return None, 0
    squares = sum(float(np.var(each)) * len(each) for each in scores)
    return math.sqrt(squares / (count - len(means)) * len(means) / count), count - len(means)


def _student(degrees_of_freedom: int) -> float:
    """Return the factor of STUDENT; beyond the table, about 1 + 1 / (2 * degrees of freedom)."""
    if degrees_of_freedom <= len(STUDENT):
        return STUDENT[degrees_of_freedom - 1]
    return 1 + 1 / (2 * degrees_of_freedom)
