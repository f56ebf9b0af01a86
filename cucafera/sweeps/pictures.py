"""Pictures of sweeps and comparisons, for reports and papers. They need matplotlib (pip install '.[plots]')."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cucafera.objectives import MetricSpec
from cucafera.storage import atomic_replace
from cucafera.sweeps.metrics import fitted_metric, shown_metrics, to_minimize
from cucafera.sweeps.optimum import Optimum
from cucafera.sweeps.records import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "pdf")
MAX_LEGEND_ENTRIES = 12
"""A picture of more curves has no legend."""
MARKERS = "osD^vP*X"
SHOWN_RANGE = 0.25
"""Share of the best run's improvement that the axis of final values covers at least: small differences look small."""
MARGIN = 1.3
"""Factor between the outermost learning rates and the ends of the axis."""


def has_matplotlib() -> bool:
    """True if matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw_learning_rates(
    groups: Mapping[str, Sequence[tuple[float, RunRecord]]], optima: Mapping[str, Optimum | None], path: Path
) -> None:
    """Draw final results against learning rates, with the parabolas, and the validation curves.

    Args:
        groups: Learning rates and their runs, by what else the runs differ in.
        optima: The optimum of each group.
        path: Path of the picture without its suffix: one file for each of FORMATS.
    """
    figure, (left, right) = _panels(2)
    records = [record for runs in groups.values() for _, record in runs]
    metric = fitted_metric(records[0].config)
    limit = _limit(records, metric)
    colours = _colours_of_rates(sorted({rate for runs in groups.values() for rate, _ in runs}))
    for number, (name, runs) in enumerate(groups.items()):
        marker, colour = MARKERS[number % len(MARKERS)], f"C{number}"
        _draw_results(left, metric, runs, optima[name], limit, marker, colour, name if len(groups) > 1 else None)
        for rate, record in sorted(runs, key=lambda run: run[0]):
            _draw_curve(right, metric, record, colours[rate], marker if len(groups) > 1 else None, f"{rate:.3g}")
    left.set_xscale("log")
    left.set_xlabel("peak learning rate")
    left.set_ylabel(f"final {metric.label} ({metric.unit})")
    left.grid(alpha=0.3)
    left.set_xlim(min(colours) / MARGIN, max(colours) * MARGIN)
    left.legend(fontsize="small")
    _finish_curves(right, metric, records)
    _add_legend(right, "peak learning rate")
    _save(figure, path)


def draw_curves(records: Sequence[RunRecord], path: Path, formats: Sequence[str] = FORMATS) -> None:
    """Draw the validation curves of some runs, a panel per metric; `path` is as for `draw_learning_rates`."""
    metrics = shown_metrics(record.config for record in records)
    figure, panels = _panels(len(metrics))
    for axes, metric in zip(panels, metrics, strict=True):
        for number, record in enumerate(records):
            points = [point for point in record.curve if metric.name in point]
            axes.plot(
                [point["tokens"] for point in points],
                [point[metric.name] for point in points],
                color=f"C{number % 10}",
                label=record.name,
            )
        _finish_curves(axes, metric, records)
    _add_legend(panels[0], None)
    _save(figure, path, formats)


def _panels(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * count, 4.0), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _limit(records: Sequence[RunRecord], metric: MetricSpec) -> float | None:
    """Return the worse end of the axis of final values, where runs without a result are marked; None without any."""
    sign = 1 if metric.direction == "lower" else -1
    first = [sign * record.curve[0][metric.name] for record in records if record.curve]
    last = [value for record in records if math.isfinite(value := to_minimize(metric, record.result(metric)))]
    if not first or not last:
        return None
    worst = max(max(last), min(last) + SHOWN_RANGE * (max(first) - min(last)))
    return sign * (worst + 0.08 * (worst - min(last)))


def _set_worse_end(axes: "Axes", metric: MetricSpec, limit: float) -> None:
    if metric.direction == "lower":
        axes.set_ylim(top=limit)
    else:
        axes.set_ylim(bottom=limit)


def _draw_results(
    axes: "Axes",
    metric: MetricSpec,
    runs: Sequence[tuple[float, RunRecord]],
    optimum: Optimum | None,
    limit: float | None,
    marker: str,
    colour: str,
    name: str | None,
) -> None:
    results = [(rate, record.result(metric)) for rate, record in runs]
    finished = [(rate, value) for rate, value in results if value is not None and math.isfinite(value)]
    others = [rate for rate, value in results if value is None or not math.isfinite(value)]
    if finished:
        axes.plot(*zip(*finished, strict=True), marker, color=colour, label=name or "run")
    if limit is not None:
        _set_worse_end(axes, metric, limit)
        if others:
            label = "diverged or failed" if name is None else None
            axes.plot(others, [limit] * len(others), "x", color=colour, clip_on=False, label=label)
    if optimum is None or optimum.value is None or optimum.fitted is None:
        return
    rates = np.geomspace(*optimum.fitted, 200)
    axes.plot(rates, optimum.at(rates), "-", color=colour, alpha=0.7, label="parabola" if name is None else None)
    text = f"optimum {optimum.value:.2g}"
    if optimum.factor is not None:
        text += f" (within a factor of {optimum.factor:.2f})"
        low, high = optimum.value / optimum.factor, optimum.value * optimum.factor
        axes.axvspan(low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axvline(optimum.value, color=colour, linestyle="--", linewidth=1, label=text)


def _colours_of_rates(rates: Sequence[float]) -> dict[float, Any]:
    """Return a colour per learning rate, from dark (low) to light (high)."""
    from matplotlib import colormaps

    shades = np.linspace(0.0, 0.92, max(len(rates), 2))
    return {rate: colormaps["viridis"](shade) for rate, shade in zip(rates, shades, strict=False)}


def _draw_curve(
    axes: "Axes", metric: MetricSpec, record: RunRecord, colour: Any, marker: str | None, name: str
) -> None:
    points = [point for point in record.curve if math.isfinite(point[metric.name])]
    axes.plot(
        [point["tokens"] for point in points],
        [point[metric.name] for point in points],
        color=colour,
        marker=marker,
        markersize=3,
        label=name,
        linestyle="-" if record.status == "finished" else ":",
    )


def _finish_curves(axes: "Axes", metric: MetricSpec, records: Sequence[RunRecord]) -> None:
    """Label the axes; the axis ends near the values before training, so one diverged run does not flatten the rest."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel("tokens")
    axes.set_ylabel(f"{metric.label} ({metric.unit})")
    axes.grid(alpha=0.3)
    before_training = [
        record.curve[0][metric.name] for record in records if record.curve and metric.name in record.curve[0]
    ]
    if before_training:
        worst = max(before_training) if metric.direction == "lower" else min(before_training)
        _set_worse_end(axes, metric, 1.02 * worst if metric.direction == "lower" else worst / 1.02)


def _add_legend(axes: "Axes", title: str | None) -> None:
    handles, names = axes.get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))  # seeds of one value share a name
    if once and len(once) <= MAX_LEGEND_ENTRIES:
        axes.legend(once.values(), once.keys(), title=title, fontsize="small", title_fontsize="small")


def _save(figure: Any, path: Path, formats: Sequence[str] = FORMATS) -> None:
    for ending in formats:
        with atomic_replace(path.with_name(f"{path.name}.{ending}")) as partial:
            figure.savefig(partial, dpi=200, format=ending)
