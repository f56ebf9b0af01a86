"""Results of evaluations: evaluation.json and TensorBoard events in the run folder, and tables for the terminal."""

import dataclasses
import io
import json
import math
import time
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from cucafera.config.errors import UserError
from cucafera.evaluation.reference import REFERENCE
from cucafera.runs.folder import EVENTS
from cucafera.runs.results import write_evaluation
from cucafera.storage import PARTIAL, atomic_write

if TYPE_CHECKING:
    from cucafera.runs.folder import RunFolder

SUFFIX = ".evaluation"
"""Suffix of our event file, whose name is otherwise that of the newest curves. TensorBoard reads files in the order of
their names, and where a training session starts it drops later steps of the files before."""


class Metric(NamedTuple):
    """A value and its standard error, if it has one."""

    value: float
    stderr: float | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one measurement.

    Attributes:
        kind: text, answers, pairs, choices or harness.
        task: Name of the text or task.
        metrics: By name.
        settings: Everything but the weights that decides the metrics, as plain data.
        note: The amount of data, for the terminal.
    """

    kind: str
    task: str
    metrics: dict[str, Metric]
    settings: dict[str, Any]
    note: str = ""


class ResultFile:
    """The evaluation.json of a run.

    Args:
        run: The run folder.

    Raises:
        UserError: the file exists and cannot be read, or was edited: it would be overwritten.
    """

    def __init__(self, run: "RunFolder") -> None:
        self.run = run
        self.folder = run.path
        self.path = run.evaluation
        self.entries = run.read_evaluation()

    def add(self, result: Result, checkpoint: str, step: int, averaged: Sequence[int] = ()) -> None:
        """Add a result, replacing an earlier one of the same measurement and weights, and write the files.

        Args:
            result: The result.
            checkpoint: Name of the checkpoint that was measured; of the last one for a mean.
            step: Its step.
            averaged: The steps whose mean was measured; none for one checkpoint.

        Raises:
            UserError: they cannot be written.
        """
        entry = {
            "kind": result.kind,
            "task": result.task,
            "metrics": {name: _as_json(metric) for name, metric in result.metrics.items()},
            "settings": result.settings,
            "checkpoint": checkpoint,
            "step": step,
            **({"averaged": list(averaged)} if averaged else {}),
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        self.entries = [*(other for other in self.entries if _key(other) != _key(entry)), entry]
        try:
            write_evaluation(self.path, self.entries)
            self._write_events()
        except OSError as error:
            raise UserError(f"the results cannot be written to {self.path}: {error.strerror or error}") from error

    def _write_events(self) -> None:
        """Write all metrics as TensorBoard scalars, replacing the earlier file; per task and step, the last result."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        points: dict[tuple[int, str], float] = {}
        for entry in self.entries:
            mean = f"mean_of_{len(entry['averaged'])}/" if "averaged" in entry else ""
            for name, metric in entry["metrics"].items():
                if metric["value"] is not None:
                    points[int(entry["step"]), f"evaluation/{entry['task']}/{mean}{name}"] = float(metric["value"])
        content = io.BytesIO()
        records = RecordWriter(content)
        records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        for (step, tag), value in sorted(points.items()):
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            records.write(Event(wall_time=time.time(), step=step, summary=summary).SerializeToString())

        names = [path.name for path in self.run.event_files()]
        curves = sorted(name for name in names if not name.endswith((SUFFIX, PARTIAL)))
        name = (curves[-1] if curves else EVENTS + "0000000001") + SUFFIX
        with atomic_write(self.folder / name) as file:
            file.write(content.getvalue())
        for other in names:
            if other.endswith(SUFFIX) and other != name:
                (self.folder / other).unlink(missing_ok=True)


def _as_json(metric: Metric) -> dict[str, float | None]:
    """Return a metric for JSON, which has neither infinity nor NaN: null."""
    return {
        name: value if value is not None and math.isfinite(value) else None for name, value in metric._asdict().items()
    }


def _key(entry: dict[str, Any]) -> str:
    names = ("kind", "task", "settings", "checkpoint", "averaged")
    return json.dumps([entry.get(name) for name in names], sort_keys=True)


def as_table(results: Sequence[Result]) -> str:
    """Return a table for the terminal, with the published values of the original cucafera where there are any."""
    rows = [["task", "metric", "value", "original"]]
    for result in results:
        # The published values are not of conversations.
        is_comparable = result.kind in ("choices", "harness") and not result.settings.get("chat_template")
        reference = REFERENCE.get(result.task, {}) if is_comparable else {}
        for number, (name, metric) in enumerate(result.metrics.items()):
            published = _formatted(Metric(*reference[name])) if name in reference else ""
            rows.append(["" if number else result.task, name, _formatted(metric), published])
    if not any(row[3] for row in rows[1:]):
        rows = [row[:3] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [f"{result.task}: {result.note}" for result in results if result.note]
    return "\n".join([*lines, "", *notes] if notes else lines)


def _formatted(metric: Metric) -> str:
    digits = 4 if abs(metric.value) < 100 else 2
    return f"{metric.value:.{digits}f}" + ("" if metric.stderr is None else f" ± {metric.stderr:.{digits}f}")
