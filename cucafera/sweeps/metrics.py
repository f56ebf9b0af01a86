"""The metrics that sweeps and comparisons use: which one ranks runs, and which one the optimum is fitted to."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from cucafera.config.registry import OBJECTIVES
from cucafera.objectives import MetricSpec, Objective


def objective_of_run(config: Mapping[str, Any]) -> Objective:
    """Return the objective of a run.

    Args:
        config: Its configuration, by dotted keys; may be empty for a run that has not started.

    Raises:
        UserError: The objective is not registered here.
    """
    objective: Objective = OBJECTIVES.get(config.get("objective.name", "pretraining"))
    return objective


def primary_metric(config: Mapping[str, Any]) -> MetricSpec:
    """Return the metric that ranks runs, and that a sweeper optimizes."""
    return objective_of_run(config).primary_metric


def fitted_metric(config: Mapping[str, Any]) -> MetricSpec:
    """Return the metric that the optimum of a sweep is fitted to: the loss, or the primary one if there is no loss."""
    objective = objective_of_run(config)
    return objective.metric(objective.comparison_metrics[0])


def shown_metrics(configs: Iterable[Mapping[str, Any]]) -> list[MetricSpec]:
    """Return the metrics of tables and pictures: the fitted and the primary metric of each run."""
    return list(
        dict.fromkeys(metric for config in configs for metric in (fitted_metric(config), primary_metric(config)))
    )


def to_minimize(metric: MetricSpec, value: float | None) -> float:
    """Return a value that is smaller the better the result is; infinite for no result, or one that is not finite."""
    if value is None or not math.isfinite(value):
        return math.inf
    return metric.cost(value)
