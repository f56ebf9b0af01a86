"""The share of the differences between the jobs of a sweep that each parameter explains alone."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FEWEST_JOBS = 9
"""Fewer say nothing: three groups of three are the least in which a valley shows."""
MOST_GROUPS = 5
"""Groups that the values of a number are divided into."""
JOBS_PER_GROUP = 3
SHUFFLES = 500
WIDE = 10.0
"""Ratio of the largest and the smallest value from which a parameter may be logarithmic."""
MIDDLE = 0.35
"""Share of the largest value that the median of such a parameter stays below; of evenly spread values it is half."""
CONFIDENCE = 0.95
"""Share of the shuffled results that a parameter must exceed to count as more than chance."""


class Importance(NamedTuple):
    """The explanation by one parameter.

    Attributes:
        share: Share of the variance of the ranks of the results, from 0 to 1.
        chance: The share that a parameter without any effect stays below with 95% probability.
    """

    share: float
    chance: float

    @property
    def is_clear(self) -> bool:
        """True if it is more than chance."""
        return self.share > self.chance


def importance(parameters: Mapping[str, Sequence[str]], costs: Sequence[float]) -> dict[str, Importance]:
    """Return what each parameter explains, the largest first; nothing for too few jobs.

    The measure is the correlation ratio of the ranks of the results (Pearson, 1905; of ranks, the statistic of Kruskal
    and Wallis, 1952), corrected for the number of groups as epsilon squared (Kelley, 1935):
    1 - (n - 1) / (n - k) * within / total, with n jobs in k groups, and the sums of squares within the groups and in
    total. It sees a valley as well as a slope; ranks make it independent of the scale, and a job without a result is
    the worst. What parameters explain only together is in none of the shares.

    Args:
        parameters: The values of each parameter, a text per job. Numbers are grouped by their quantiles.
        costs: The results, lower is better; infinite without one.
    """
    if len(costs) < FEWEST_JOBS:
        return {}
    ranks = _ranks(np.array(costs))
    random = np.random.default_rng(0)
    shuffled = np.array([random.permutation(ranks) for _ in range(SHUFFLES)])
    found = {}
    for name, values in parameters.items():
        groups = _groups(values)
        if len(ranks) > groups.max() + 1 > 1 and ranks.std() > 0:
            chance = float(np.quantile(_explained(groups, shuffled), CONFIDENCE))
            found[name] = Importance(max(0.0, float(_explained(groups, ranks[None])[0])), chance)
    return dict(sorted(found.items(), key=lambda item: -item[1].share))


def _explained(groups: NDArray[np.int64], ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return epsilon squared for each row of ranks."""
    members = np.eye(groups.max() + 1)[groups]  # jobs x groups
    means = ranks @ members / members.sum(0)
    within = ((ranks - means[:, groups]) ** 2).sum(1)
    total = ((ranks - ranks.mean(1, keepdims=True)) ** 2).sum(1)
    jobs, count = members.shape
    return np.asarray(1 - (jobs - 1) / (jobs - count) * within / total)


def _ranks(costs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the ranks from 1; equal results share the mean of theirs."""
    _, position, counts = np.unique(costs, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[position]


def _groups(values: Sequence[str]) -> NDArray[np.int64]:
    """Return the number of the group of each job: by value, or by quantile if there are many different numbers."""
    count = max(2, min(MOST_GROUPS, len(values) // JOBS_PER_GROUP))
    _, position = np.unique(values, return_inverse=True)
    numbers = as_numbers(values)
    if numbers is not None and position.max() + 1 > count:
        borders = np.quantile(numbers, np.arange(1, count) / count)
        _, position = np.unique(np.searchsorted(borders, numbers, side="right"), return_inverse=True)
    return position.astype(np.int64)


def as_numbers(values: Sequence[str]) -> list[float] | None:
    """Return texts as numbers; None unless all are finite ones."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None


def is_logarithmic(numbers: Sequence[float]) -> bool:
    """True if values are spread by ratios rather than by differences."""
    return (
        min(numbers) > 0 and max(numbers) >= WIDE * min(numbers) and float(np.median(numbers)) < MIDDLE * max(numbers)
    )
