"""Pictures of sweeps and comparisons, for reports and papers; they need matplotlib (pip install '.[plots]')."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cucafera.sweeps.optimum import Optimum
from cucafera.sweeps.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "pdf")
MOST_IN_LEGEND = 12
"""More curves than that get no names."""
MARKERS = "osD^vP*X"
SHOWN_RANGE = 0.25
"""Share of what the best run has learned that the axis of final losses shows at least: worse runs need not fit."""
ROOM_BESIDE = 1.3
"""Factor that is left free beside the outermost learning rates."""


def has_matplotlib() -> bool:
    """Whether pictures can be made here."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def draw_learning_rates(
    groups: Mapping[str, Sequence[tuple[float, Record]]], optima: Mapping[str, Optimum | None], path: Path
) -> None:
    """Loss against learning rate with the parabolas, and the loss curves.

    Args:
        groups: By what else the runs differ in: learning rates and their runs.
        optima: The optimum of each group.
        path: Where the picture goes, without the ending: one file for each of FORMATS.
    """
    figure, (left, right) = _panels()
    records = [record for runs in groups.values() for _, record in runs]
    ceiling = _ceiling(records)
    colours = _colours_of_rates(sorted({rate for runs in groups.values() for rate, _ in runs}))
    for number, (name, runs) in enumerate(groups.items()):
        marker, colour = MARKERS[number % len(MARKERS)], f"C{number}"
        _draw_losses(left, runs, optima[name], ceiling, marker, colour, name if len(groups) > 1 else None)
        for rate, record in sorted(runs, key=lambda run: run[0]):
            _draw_curve(right, record, colours[rate], marker if len(groups) > 1 else None, f"{rate:.3g}")
    left.set_xscale("log")
    left.set_xlabel("peak learning rate")
    left.set_ylabel("final validation loss (nats per token)")
    left.grid(alpha=0.3)
    left.set_xlim(min(colours) / ROOM_BESIDE, max(colours) * ROOM_BESIDE)
    left.legend(fontsize="small")
    _finish_curves(right, records, "peak learning rate")
    _save(figure, path)


def draw_curves(records: Sequence[Record], path: Path, formats: Sequence[str] = FORMATS) -> None:
    """The validation curves of some runs, in nats per token and in bits per byte; the path is as for the other."""
    figure, (left, right) = _panels()
    for number, record in enumerate(records):
        tokens = [point["tokens"] for point in record.curve]
        for axes, what in ((left, "loss"), (right, "bpb")):
            axes.plot(tokens, [point[what] for point in record.curve], color=f"C{number % 10}", label=record.name)
    _finish_curves(left, records, None)
    _finish_curves(right, [], None)
    right.set_ylabel("validation loss (bits per byte)")
    _save(figure, path, formats)


def _panels() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 4.0), layout="constrained")
    return figure, figure.subplots(1, 2)


def _ceiling(records: Sequence[Record]) -> float | None:
    """The top of the axis of final losses; None if there are none."""
    first = [record.curve[0]["loss"] for record in records if record.curve]
    last = [record.loss for record in records if math.isfinite(record.loss)]
    if not first or not last:
        return None
    highest = max(max(last), min(last) + SHOWN_RANGE * (max(first) - min(last)))
    return highest + 0.08 * (highest - min(last))


def _draw_losses(
    axes: "Axes",
    runs: Sequence[tuple[float, Record]],
    optimum: Optimum | None,
    ceiling: float | None,
    marker: str,
    colour: str,
    name: str | None,
) -> None:
    finished = [(rate, record.loss) for rate, record in runs if math.isfinite(record.loss)]
    others = [rate for rate, record in runs if not math.isfinite(record.loss)]
    if finished:
        axes.plot(*zip(*finished, strict=True), marker, color=colour, label=name or "run")
    if ceiling is not None:
        axes.set_ylim(top=ceiling)
        if others:
            label = "diverged or failed" if name is None else None
            axes.plot(others, [ceiling] * len(others), "x", color=colour, clip_on=False, label=label)
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
    """From dark, low, to light, high."""
    from matplotlib import colormaps

    shades = np.linspace(0.0, 0.92, max(len(rates), 2))
    return {rate: colormaps["viridis"](shade) for rate, shade in zip(rates, shades, strict=False)}


def _draw_curve(axes: "Axes", record: Record, colour: Any, marker: str | None, name: str) -> None:
    points = [point for point in record.curve if math.isfinite(point["loss"])]
    axes.plot(
        [point["tokens"] for point in points],
        [point["loss"] for point in points],
        color=colour,
        marker=marker,
        markersize=3,
        label=name,
        linestyle="-" if record.status == "finished" else ":",
    )


def _finish_curves(axes: "Axes", records: Sequence[Record], title: str | None) -> None:
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel("tokens")
    axes.set_ylabel("validation loss (nats per token)")
    axes.grid(alpha=0.3)
    before_training = [record.curve[0]["loss"] for record in records if record.curve]
    if before_training:
        axes.set_ylim(top=1.02 * max(before_training))  # one that diverged does not flatten the others
    handles, names = axes.get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))  # seeds of one value share a name
    if records and len(once) <= MOST_IN_LEGEND:
        axes.legend(once.values(), once.keys(), title=title, fontsize="small", title_fontsize="small")


def _save(figure: Any, path: Path, formats: Sequence[str] = FORMATS) -> None:
    for ending in formats:
        figure.savefig(path.with_name(f"{path.name}.{ending}"), dpi=200)
