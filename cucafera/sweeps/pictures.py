"""Pictures of sweeps and comparisons, for reports and papers. They need matplotlib (pip install '.[plots]').

Colours are those of Okabe and Ito, which colour-blind people can tell apart, and runs differ in their lines too, for
print. Names are shown as they are, never as formulas, and only with what differs.
"""

import math
import os
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cucafera.objectives import MetricSpec
from cucafera.output import printable
from cucafera.quantities import number_of
from cucafera.storage import atomic_replace
from cucafera.sweeps import NOT_GIVEN, RATE, SEED
from cucafera.sweeps.importance import WIDE, Importance, as_numbers, is_logarithmic
from cucafera.sweeps.metrics import fitted_metric, shown_metrics, to_minimize
from cucafera.sweeps.optimum import Optimum
from cucafera.sweeps.records import RunRecord, differing_keys

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "pdf")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of Okabe and Ito (2008), Color Universal Design; without yellow, which paper swallows."""
OTHERS = "#A0A0A0"
MARKERS = "osD^vP*X"
LINES = ("-", "--", "-.", ":")
MOST_NAMED = len(COLOURS)
"""Of more curves only the best have names."""
BEST_NAMED = 3
MOST_RATES = 10
"""More learning rates have a bar of colours in place of a legend."""
MOST_TICKS = 9
"""More values of a parameter are not written one by one."""
MOST_PARAMETERS = 7
LONGEST_LABEL, MOST_LINES = 42, 3
"""Characters of a line of a name in a legend, and lines of such a name."""
SHOWN_RANGE = 0.25
"""Share of the best run's improvement that the axis of final values covers at least: small differences look small."""
WIDTH = 10.4
"""Inches: of a page in landscape, and readable at the width of a web page."""
PANEL_HEIGHT, LINE_HEIGHT = 3.5, 0.2
"""Inches: of a panel with the names of its axes, and of a line of a legend."""
CHARACTERS = 150
"""Of the text of legends across the picture."""
LEGEND = "legend"
UNNAMED = re.compile(r"_child\d+$|_nolegend_$|$")
"""What matplotlib calls an artist without a label."""
LONGEST_TICK = 24


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
    rates = sorted({rate for runs in groups.values() for rate, _ in runs})
    colours = _colours_of_rates(rates)
    for number, (name, runs) in enumerate(groups.items()):
        marker, colour = MARKERS[number % len(MARKERS)], COLOURS[number % len(COLOURS)]
        _draw_points(left, metric, runs, limit, marker, colour, name or "run")
        _draw_fit(left, optima[name], colour, len(groups) == 1)
        for rate, record in sorted(runs, key=lambda run: run[0]):
            _draw_curve(
                right, metric, record, colours[rate], marker if len(groups) > 1 else "", LINES[number % len(LINES)],
                f"{rate:.3g}",
            )  # fmt: skip
    _number_axis(left, "peak learning rate", rates, is_log=True)
    _name_results(left, metric)
    _add_legend(left)
    _finish_curves(right, metric, records)
    if len(rates) <= MOST_RATES:
        _add_legend(right, "peak learning rate")
    else:
        _add_colour_bar(figure, right, rates)
    _save(figure, path)


def draw_parameters(
    records: Sequence[RunRecord], keys: Sequence[str], shares: Mapping[str, Importance], path: Path
) -> None:
    """Draw what each parameter explains, final results against each parameter, and the validation curves.

    Args:
        records: The runs, the best first.
        keys: The parameters.
        shares: What they explain, the largest first; empty if that is unknown.
        path: As for `draw_learning_rates`.
    """
    shown = sorted(keys, key=lambda key: (list(shares).index(key) if key in shares else len(shares), keys.index(key)))
    shown = shown[:MOST_PARAMETERS]
    has_shares = len(shares) > 1
    figure, panels = _panels(has_shares + len(shown) + 1)
    metric = fitted_metric(records[0].config)
    limit = _limit(records, metric)
    if has_shares:
        _draw_shares(panels[0], shares)
    for axes, key in zip(panels[has_shares:], shown, strict=False):
        _draw_parameter(axes, metric, records, key, limit)
    _draw_named_curves(panels[-1], metric, records)
    _save(figure, path)


def draw_curves(records: Sequence[RunRecord], path: Path, formats: Sequence[str] = FORMATS) -> None:
    """Draw the validation curves of some runs, a panel per metric; `path` is as for `draw_learning_rates`."""
    metrics = shown_metrics(record.config for record in records)
    figure, panels = _panels(len(metrics))
    for axes, metric in zip(panels, metrics, strict=True):
        _draw_named_curves(axes, metric, records)
    _save(figure, path, formats)


def labels_of(records: Sequence[RunRecord]) -> list[str]:
    """Return a short name for each run: what differs between them, each name once."""
    settings = [record.settings for record in records]
    keys = differing_keys(settings)
    shown = _short_keys(keys)
    if keys and all(record.job for record in records):
        found = [
            ", ".join(f"{shown[key]}={_shortened(record.shown(key), LONGEST_TICK)}" for key in keys)
            for record in records
        ]
    else:
        names = [record.name for record in records]
        is_one_tree = len(names) > 1 and len({Path(name).is_absolute() for name in names}) == 1
        common = os.path.commonpath(names) if is_one_tree else ""
        found = [os.path.relpath(name, common) if common else name for name in names]
    labels: list[str] = []
    for name in found:
        label = short = "\n".join(_lines_of(printable(name)))
        number = 1
        while label in labels:
            number += 1
            label = f"{short} ({number})"
        labels.append(label)
    return labels


def _lines_of(name: str) -> list[str]:
    """Return the lines of a name in a legend; the middle of what is too long for them is left out."""
    lines = textwrap.wrap(name, LONGEST_LABEL, break_long_words=False, break_on_hyphens=False) or [""]
    lines = lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], f"… {lines[-1]}"]
    return [_shortened(line) for line in lines]


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return the last parts of dotted keys, where these are unique."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)}


def _shortened(text: str, longest: int = LONGEST_LABEL) -> str:
    """Return a text without its middle if it is long."""
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"


def _panels(count: int) -> tuple[Any, Any]:
    """Return a figure and its panels, two or three in a row, each with room for its legend below it."""
    from matplotlib.figure import Figure

    columns = min(count, 2 if count <= 4 else 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else 0.65 * WIDTH, 1.0))
    figure.set_layout_engine("constrained")
    grid = figure.add_gridspec(2 * rows, columns)
    panels = []
    for number in range(count):
        row, column = divmod(number, columns)
        panels.append(figure.add_subplot(grid[2 * row, column]))
        figure.add_subplot(grid[2 * row + 1, column], label=LEGEND).set_axis_off()
    return figure, panels


def _fit_heights(figure: Any) -> None:
    """Give each row of legends the height of its longest."""
    below = [axes for axes in figure.axes if axes.get_label() == LEGEND]
    grid = below[0].get_gridspec()
    heights = [PANEL_HEIGHT, 0.05] * (grid.nrows // 2)
    for axes in below:
        if legend := axes.get_legend():
            names = [text.get_text().count("\n") + 1 for text in legend.get_texts()]
            lines = sum(names) / legend._ncols + max(names) / 2 + bool(legend.get_title().get_text())
            row = axes.get_subplotspec().rowspan.start
            heights[row] = max(heights[row], 0.1 + LINE_HEIGHT * lines)
    grid.set_height_ratios(heights)
    figure.set_figheight(sum(heights) + 0.3)


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


def _draw_points(
    axes: "Axes",
    metric: MetricSpec,
    runs: Sequence[tuple[float, RunRecord]],
    limit: float | None,
    marker: str,
    colour: str,
    name: str,
) -> None:
    """Draw final results at some positions; at the worse end of the axis those of runs that have none."""
    results = [(position, record.result(metric)) for position, record in runs]
    finished = [(position, value) for position, value in results if value is not None and math.isfinite(value)]
    others = [position for position, value in results if value is None or not math.isfinite(value)]
    size = 6 if len(runs) <= 40 else 4
    if finished:
        axes.plot(*zip(*finished, strict=True), marker, color=colour, markersize=size, alpha=0.85, label=name)
    if limit is not None:
        _set_worse_end(axes, metric, limit)
        if others:
            axes.plot(
                others, [limit] * len(others), "x", color=colour, markersize=9, markeredgewidth=2, clip_on=False,
                label="diverged or failed",
            )  # fmt: skip
    axes.grid(alpha=0.3)


def _draw_fit(axes: "Axes", optimum: Optimum | None, colour: str, is_alone: bool) -> None:
    if optimum is None or optimum.value is None or optimum.fitted is None:
        return
    rates = np.geomspace(*optimum.fitted, 200)
    axes.plot(rates, optimum.at(rates), "-", color=colour, alpha=0.7, label="parabola" if is_alone else None)
    text = f"optimum {optimum.value:.2g}"
    if optimum.interval is not None:
        low, high = optimum.interval
        text += f" (68%: {low:.2g} to {high:.2g})"
        if is_alone:
            axes.axvspan(low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axvline(optimum.value, color=colour, linestyle="--", linewidth=1, label=text)


def _number_axis(axes: "Axes", label: str, values: Sequence[float], is_log: bool) -> None:
    """Label the axis of a number; a few values are written one by one."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    if is_log:
        axes.set_xscale("log")
        reach = (max(values) / min(values)) ** 0.06 if max(values) > min(values) else 1.3
        axes.set_xlim(min(values) / reach, max(values) * reach)
    different = sorted(set(values))
    near = np.diff(np.log(different) if is_log else different)
    if len(different) <= MOST_TICKS and (len(near) == 0 or near.min() > near.sum() / 14):
        axes.set_xticks(different, [f"{value:.4g}" for value in different], rotation=30 if len(different) > 5 else 0)
        axes.xaxis.set_minor_locator(NullLocator())
    elif is_log and max(values) / min(values) < WIDE**2:
        axes.tick_params(axis="x", which="both", pad=5, rotation=30)
        formatter = FuncFormatter(lambda value, _: f"{value:.3g}" if f"{value:.0e}"[0] in "125" else "")
        axes.xaxis.set_major_formatter(formatter)
        axes.xaxis.set_minor_formatter(formatter)
    axes.set_xlabel(label)


def _draw_parameter(
    axes: "Axes", metric: MetricSpec, records: Sequence[RunRecord], key: str, limit: float | None
) -> None:
    """Draw final results against a parameter: on an axis of numbers, or side by side for what is none."""
    values = [record.settings.get(key, NOT_GIVEN) for record in records]
    numbers = as_numbers(values)
    if numbers is not None:
        is_log = is_logarithmic(numbers)
        few = len(set(numbers)) <= MOST_TICKS
        uneven = (
            few and min(numbers) <= 0 and max(numbers) >= WIDE * min((abs(n) for n in numbers if n), default=math.inf)
        )
        if uneven:
            values = [f"{number:.4g}" for number in numbers]
    if numbers is not None and not uneven:
        positions = numbers
        _number_axis(axes, _axis_label(key), numbers, is_log)
    else:
        if numbers is None:
            values = [_shortened(printable(record.shown(key)), LONGEST_TICK) for record in records]
        texts = sorted(set(values), key=lambda text: (numbers is not None and float(text), text))
        positions = [float(texts.index(value)) for value in values]
        axes.set_xticks(range(len(texts)), texts)
        is_long = sum(map(len, texts)) > 30
        for tick in axes.get_xticklabels():
            tick.set_parse_math(False)
            tick.set(rotation=20 if is_long else 0, ha="right" if is_long else "center", fontsize="small")
        if len(texts) > 3 * MOST_TICKS:
            axes.set_xticks([])
        axes.set_xlim(-0.5, len(texts) - 0.5)
        axes.set_xlabel(_axis_label(key))
    points = list(zip(positions, records, strict=True))
    _draw_points(axes, metric, points, limit, "o", COLOURS[0], "run")
    results = ((position, record.result(metric)) for position, record in points)
    best = next(((position, result) for position, result in results if result is not None), None)
    if best is not None and key != SEED:
        axes.plot(
            *best, "*", color=COLOURS[1], markersize=13, markeredgecolor="black", clip_on=False, zorder=4, label="best"
        )
    _name_results(axes, metric)
    _add_legend(axes)


def _name_results(axes: "Axes", metric: MetricSpec) -> None:
    axes.set_ylabel(f"final {metric.label_with_unit}".replace(" (", "\n("))


def _axis_label(key: str) -> str:
    return "peak learning rate" if key == RATE else _shortened(key)


def _draw_shares(axes: "Axes", shares: Mapping[str, Importance]) -> None:
    """Draw a bar for each parameter, and where chance ends."""
    shown = dict(list(shares.items())[:MOST_PARAMETERS])
    keys = _short_keys(list(shown))
    for number, each in enumerate(shown.values()):
        axes.barh(number, 100 * each.share, color=COLOURS[0] if each.is_clear else OTHERS, height=0.6)
        axes.plot([100 * each.chance] * 2, [number - 0.4, number + 0.4], ":", color="black", linewidth=1.5)
        inside = each.share > 0.8
        axes.text(
            100 * max(each.share, 0) + (-1.5 if inside else 1.5), number, f"{each.share:.0%}",
            va="center", ha="right" if inside else "left", color="white" if inside else "black",
            bbox=None if inside else {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
        )  # fmt: skip
    axes.plot([], [], ":", color="black", linewidth=1.5, label="without any effect, 95% lie below")
    axes.set_yticks(range(len(shown)), [_shortened(keys[key]) for key in shown])
    axes.set_xlim(0, 100)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("explains alone (% of the variance of ranks)")
    axes.grid(alpha=0.3, axis="x")
    _add_legend(axes)


def _colours_of_rates(rates: Sequence[float]) -> dict[float, Any]:
    """Return a colour per learning rate, from dark (low) to light (high)."""
    from matplotlib import colormaps

    shades = np.linspace(0.0, 0.92, max(len(rates), 2))
    return {rate: colormaps["viridis"](shade) for rate, shade in zip(rates, shades, strict=False)}


def _add_colour_bar(figure: Any, axes: "Axes", rates: Sequence[float]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    colours = LinearSegmentedColormap.from_list("rates", colormaps["viridis"](np.linspace(0, 0.92, 64)))
    figure.colorbar(ScalarMappable(LogNorm(rates[0], rates[-1]), colours), ax=axes, label="peak learning rate")


def _draw_named_curves(axes: "Axes", metric: MetricSpec, records: Sequence[RunRecord]) -> None:
    """Draw the curves of some runs: each with its name, or of many the best ones, over the others in grey."""
    labels = labels_of(records)
    order = sorted(range(len(records)), key=lambda number: records[number].rank)
    named = order[:BEST_NAMED] if len(records) > MOST_NAMED else list(range(len(records)))
    for number in (number for number in order if number not in named):
        _draw_curve(axes, metric, records[number], OTHERS, "", "-", "", width=0.7, layer=1)
    for position, number in enumerate(named):
        colour, line = COLOURS[position % len(COLOURS)], LINES[position % len(LINES)]
        _draw_curve(axes, metric, records[number], colour, MARKERS[position], line, labels[number], layer=2)
    if len(named) < len(records):
        axes.plot(
            [], [], "-", color=OTHERS, linewidth=0.7, label=f"{number_of(len(records) - len(named), 'other run')}"
        )
    _finish_curves(axes, metric, records)
    _add_legend(axes, "the best" if len(named) < len(records) else "")


def _draw_curve(
    axes: "Axes",
    metric: MetricSpec,
    record: RunRecord,
    colour: Any,
    marker: str,
    line: str,
    name: str,
    width: float = 1.6,
    layer: int = 2,
) -> None:
    """Draw the validations of a run; a cross ends the curve of one that did not finish."""
    points = [point for point in record.curve if math.isfinite(point.get(metric.name, math.nan))]
    x, y = [point["tokens"] for point in points], [point[metric.name] for point in points]
    axes.plot(
        x, y, color=colour, marker=marker, markersize=4, markevery=max(1, len(x) // 8), linestyle=line, linewidth=width,
        label=name or None, zorder=layer,
    )  # fmt: skip
    if points and record.status != "finished":
        axes.plot(x[-1], y[-1], "x", color=colour, markersize=8, markeredgewidth=2, zorder=layer)


def _finish_curves(axes: "Axes", metric: MetricSpec, records: Sequence[RunRecord]) -> None:
    """Label the axes; the axis ends near the values before training, so one diverged run does not flatten the rest."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel("tokens")
    axes.set_ylabel(metric.label_with_unit.replace(" (", "\n("))
    axes.grid(alpha=0.3)
    before_training = [
        record.curve[0][metric.name] for record in records if record.curve and metric.name in record.curve[0]
    ]
    if before_training:
        worst = max(before_training) if metric.direction == "lower" else min(before_training)
        _set_worse_end(axes, metric, 1.02 * worst if metric.direction == "lower" else worst / 1.02)


def _add_legend(axes: "Axes", title: str = "") -> None:
    """Add the names below a panel, each once, as they are: matplotlib would drop `_a` and take `$a$` for a formula."""
    drawn = [artist for artist in (*axes.lines, *axes.patches) if not UNNAMED.match(str(artist.get_label()))]
    once = {str(artist.get_label()): artist for artist in reversed(drawn)}
    place = axes.get_subplotspec()
    if not once or place is None or axes.figure is None:
        return
    names = list(reversed(once))
    room = CHARACTERS // place.get_gridspec().ncols
    columns = max(1, min(4, len(names), room // (max(len(line) for name in names for line in name.split("\n")) + 6)))
    (below,) = (
        other
        for other in axes.figure.axes
        if other.get_label() == LEGEND
        and (spec := other.get_subplotspec()) is not None
        and (spec.rowspan.start, spec.colspan.start) == (place.rowspan.start + 1, place.colspan.start)
    )
    legend = below.legend(
        [once[name] for name in names], ["x"] * len(names), title=title or None, fontsize="small",
        title_fontsize="small", loc="upper center", borderaxespad=0, ncols=columns, frameon=False,
    )  # fmt: skip
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(parse_math=False, text=name, linespacing=1.15)


def _save(figure: Any, path: Path, formats: Sequence[str] = FORMATS) -> None:
    _fit_heights(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box is shown for it
        for ending in formats:
            with atomic_replace(path.with_name(f"{path.name}.{ending}")) as partial:
                figure.savefig(partial, dpi=200, format=ending)
