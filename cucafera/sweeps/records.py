"""The results of runs, read from their folders, and tables of them."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from cucafera.config.errors import UserError
from cucafera.config.fields import flat, format_value
from cucafera.config.folders import rounded
from cucafera.config.quoting import parse
from cucafera.markup import markdown_table
from cucafera.objectives import MetricSpec
from cucafera.runs.compatibility import KEYS_WITHOUT_EFFECT, matches_key
from cucafera.runs.folder import RunFolder
from cucafera.storage import list_folder
from cucafera.sweeps import NOT_GIVEN
from cucafera.sweeps.jobs import JOB_FILE, JobRecord
from cucafera.sweeps.metrics import objective_of_run, primary_metric, shown_metrics, to_minimize
from cucafera.terminal_table import terminal_table, terminal_width


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        folder: The run folder.
        name: Its name in tables.
        config: Its configuration, by dotted keys; empty if it was refused before it started.
        job: The record of it as a job, if it is one of a sweep.
        metrics: Its metrics.json; None if it has not finished.
        curve: Its validations so far: step, tokens, and each metric by name.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    job: JobRecord | None
    metrics: dict[str, Any] | None
    curve: list[dict[str, float]]

    @property
    def status(self) -> str:
        """Status of its job; see `JobRecord`."""
        if self.job is not None:
            return self.job.status
        return "finished" if self.metrics is not None else "not finished"

    @functools.cached_property
    def settings(self) -> dict[str, str]:
        """The values that the command line of a job set."""
        return settings_of(self.job.overrides if self.job else [])

    def shown(self, key: str) -> str:
        """Return the value of a swept key for the user: rounded, without quotes."""
        value = self.settings.get(key, NOT_GIVEN)
        override = parse(f"key={value}")
        return rounded(str(override.value()) if override and isinstance(override.value(), str) else value)

    def result(self, metric: MetricSpec) -> float | None:
        """Return the last value of a metric; None if the run has none, or has not finished."""
        return self.curve[-1].get(metric.name) if self.status == "finished" else None

    @property
    def rank(self) -> float:
        """The primary metric as a number that is smaller the better the run is; infinite without a result."""
        metric = primary_metric(self.config)
        return to_minimize(metric, self.result(metric))


def settings_of(overrides: Sequence[str]) -> dict[str, str]:
    """Return the keys of overrides with their values as Hydra writes them; of repeated keys the last value."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return {override.key_or_group: override.get_value_element_as_str() for override in parsed}


def read_records(folder: Path, within: Path | None) -> list[RunRecord]:
    """Return the run in a folder, or all runs below it.

    Args:
        folder: The folder.
        within: Folder that names are relative to; None: names are paths.

    Raises:
        UserError: there is none, or one cannot be read.
    """
    try:
        folders = [folder] if (folder / "config.yaml").exists() else sorted(_runs_below(folder, set()))
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from error
    if not folders:
        raise UserError(f"{folder}: there is no run")
    return [_read_record(run, str(run.relative_to(within) if within not in (None, run) else run)) for run in folders]


def _runs_below(folder: Path, seen: set[str]) -> Iterator[Path]:
    """Yield the folders of runs and jobs in and below a folder, also through symlinks. Raises OSError.

    Args:
        folder: The folder.
        seen: Real paths of folders that were visited before, which a symlink may lead back to.
    """
    place = os.path.realpath(folder)
    if place in seen:
        return
    seen.add(place)
    entries = list_folder(folder)
    is_run = not {JOB_FILE, "config.yaml"}.isdisjoint(entry.name for entry in entries)
    if is_run:
        yield folder
    for entry in entries:
        is_hidden = entry.name.startswith(".") or (is_run and entry.name == "checkpoints")
        lost = entry.is_symlink() and not entry.exists() and not is_run  # perhaps a run on a disk that is not mounted
        if (entry.is_dir() or lost) and not is_hidden:
            yield from _runs_below(entry, seen)


def _read_record(path: Path, name: str) -> RunRecord:
    folder = RunFolder(path)
    config = folder.read_config() if folder.config.exists() or folder.config.is_symlink() else {}
    metrics = folder.read_metrics()
    settings = dict(flat(config))
    try:
        objective_of_run(settings)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    curve = metrics["validation"] if metrics else _curve_of_events(path, settings)
    return RunRecord(path, name, settings, JobRecord.read(path), metrics, curve)


def _curve_of_events(path: Path, config: dict[str, Any]) -> list[dict[str, float]]:
    """Return the validations of a run that has not finished, from its TensorBoard events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for file in RunFolder(path).event_files():
        if not file.is_file():
            raise UserError(f"{file} cannot be read: it is not a regular file")
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    values: dict[int, dict[str, float]] = {}
    names = {metric.name for metric in shown_metrics([config])}
    objective = objective_of_run(config)
    for name in names:
        if (curve := objective.curve(name)) in events.Tags()["scalars"]:
            for event in events.Scalars(curve):
                values.setdefault(event.step, {})[name] = event.value
    batch_tokens = int(config.get("batch_tokens", 0))
    return [
        {"step": step, "tokens": step * batch_tokens, **values[step]}
        for step in sorted(values)
        if values[step].keys() == names
    ]


def differing_keys(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys whose values are not equal in all of the settings, in the order in which they first occur."""
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)]


def differences(records: Sequence[RunRecord]) -> list[list[str]]:
    """Return a table of the keys that differ: a column per run, or a row per run if there are more runs than keys."""
    keys = [
        key
        for key in differing_keys([record.config for record in records])
        if not matches_key(key, KEYS_WITHOUT_EFFECT)
    ]
    rows = [
        [key, *(format_value(record.config[key]) if key in record.config else "" for record in records)] for key in keys
    ]
    table = [["", *(record.name for record in records)], *rows]
    return table if len(records) <= len(keys) else [list(row) for row in zip(*table, strict=True)]


def result_columns(metrics: Sequence[MetricSpec]) -> list[str]:
    """Return the names of the columns of `results_of`."""
    names = [metric.name for metric in metrics]
    return ["status", *names, *(f"best {name}" for name in names), "steps", "tokens", "tokens/s"]


def results_of(record: RunRecord, metrics: Sequence[MetricSpec]) -> list[float | str | None]:
    """Return the results of a run, one per column of `result_columns`; None for what is unknown."""
    if not record.curve or record.status == "refused":  # an earlier run left the curve of a run that was refused
        return [record.status, *[None] * (len(result_columns(metrics)) - 1)]
    last = record.curve[-1]
    best = [_best([point.get(metric.name) for point in record.curve], metric) for metric in metrics]
    speed = record.metrics["tokens_per_second"] if record.metrics else None
    values = [last.get(metric.name) for metric in metrics]
    return [record.status, *values, *best, last["step"], last["tokens"], speed]


def _best(values: Sequence[float | None], metric: MetricSpec) -> float | None:
    return min(values, key=lambda value: to_minimize(metric, value))


def in_figures(values: Sequence[float | str | None]) -> list[str]:
    """Return a row of a table as text."""
    texts = []
    for value in values:
        if isinstance(value, str) or value is None:
            texts.append(value or "")
        elif isinstance(value, int):
            texts.append(f"{value:,}")
        else:
            texts.append(f"{value:,.0f}" if value >= 100 else f"{value:.3f}")
    return texts


def units_of(metrics: Sequence[MetricSpec]) -> str:
    """Return the units of some metrics, for the heading of a table: "loss in nats per token, bpb in bits per byte"."""
    return ", ".join(
        f"{metric.name} {metric.unit if metric.unit.startswith('per ') else f'in {metric.unit}'}"
        for metric in metrics
        if metric.unit
    )


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; the first row is its head."""
    return "\n".join(markdown_table(rows))


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Return a table for the terminal; the first row is its head, and the first column has the names of the rows."""
    return terminal_table(rows, terminal_width())
