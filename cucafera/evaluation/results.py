"""What was measured, kept beside the run: evaluation.json, TensorBoard, and tables for the terminal."""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from cucafera.config import UserError
from cucafera.data.files import write_text
from cucafera.evaluation.reference import REFERENCE
from cucafera.training.events import EVENTS, EventFile
from cucafera.training.run_folder import RunFolder

ENDING = ".evaluation"
"""Ends the name of the event file, behind that of the newest curves. TensorBoard reads files in the order of their
names, and where a session of training begins it drops what files before hold of later steps."""


class Metric(NamedTuple):
    """A figure and its standard error, if it has one."""

    value: float
    stderr: float | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """What one measurement has given.

    Attributes:
        kind: text, answers, choices or harness.
        task: What was measured with.
        metrics: The figures, by name.
        settings: All that decides them beside the weights, as plain data.
        note: How much was measured, for the terminal.
    """

    kind: str
    task: str
    metrics: dict[str, Metric]
    settings: dict[str, Any]
    note: str = ""


class ResultFile:
    """evaluation.json of a run.

    Args:
        run: The run folder.

    Raises:
        UserError: there is one that cannot be read.
    """

    def __init__(self, run: RunFolder) -> None:
        self.folder = run.path
        self.path = run.evaluation
        self.entries = self._read()

    def add(self, results: Sequence[Result], checkpoint: str, step: int) -> None:
        """Adds results of a checkpoint, in place of earlier ones of the same measurement, and writes all of them.

        Raises:
            UserError: they cannot be written.
        """
        for result in results:
            entry = {
                "kind": result.kind,
                "task": result.task,
                "metrics": {name: _plain(metric) for name, metric in result.metrics.items()},
                "settings": result.settings,
                "checkpoint": checkpoint,
                "step": step,
                "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            }
            kept = [other for other in self.entries if _key(other) != _key(entry)]
            self.entries = [*kept, entry]
        try:
            write_text(self.path, json.dumps({"results": self.entries}, indent=2, ensure_ascii=False) + "\n")
            self._write_events()
        except OSError as error:
            raise UserError(f"the results cannot be written to {self.path}: {error.strerror or error}") from error

    def _read(self) -> list[dict[str, Any]]:
        try:
            content = json.loads(self.path.read_bytes())
            entries: list[dict[str, Any]] = content["results"]
            for entry in entries:
                _key(entry), entry["metrics"].items(), int(entry["step"])
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path} is damaged, and would be overwritten: mend it, or move it out of the way"
            ) from error
        return entries

    def _write_events(self) -> None:
        """Writes the figures for TensorBoard, in place of those written before; of each step the last of a task."""
        points: dict[tuple[int, str], float] = {}
        for entry in self.entries:
            for name, metric in entry["metrics"].items():
                if metric["value"] is not None:
                    points[int(entry["step"]), f"evaluation/{entry['task']}/{name}"] = float(metric["value"])
        earlier = list(self.folder.glob(EVENTS + "*" + ENDING))
        curves = sorted(path.name for path in self.folder.glob(EVENTS + "*") if not path.name.endswith(ENDING))
        name = (curves[-1] if curves else EVENTS + "0000000001") + ENDING
        events = EventFile(self.folder, name)
        for (step, tag), value in sorted(points.items()):
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            events.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        events.close()
        for path in earlier:
            if path.name != name:
                path.unlink(missing_ok=True)


def _plain(metric: Metric) -> dict[str, float | None]:
    """A metric as JSON, which knows no infinity."""
    return {
        name: value if value is not None and math.isfinite(value) else None for name, value in metric._asdict().items()
    }


def _key(entry: dict[str, Any]) -> str:
    return json.dumps([entry[name] for name in ("kind", "task", "settings", "checkpoint")], sort_keys=True)


def as_table(results: Sequence[Result]) -> str:
    """The figures for the terminal, with what the original cucafera has published where there is such a figure."""
    rows = [["task", "metric", "value", "the original"]]
    for result in results:
        reference = REFERENCE.get(result.task, {}) if result.kind in ("choices", "harness") else {}
        for number, (name, metric) in enumerate(result.metrics.items()):
            published = _shown(Metric(*reference[name])) if name in reference else ""
            rows.append(["" if number else result.task, name, _shown(metric), published])
    if not any(row[3] for row in rows[1:]):
        rows = [row[:3] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [f"{result.task}: {result.note}" for result in results if result.note]
    return "\n".join([*lines, "", *notes] if notes else lines)


def _shown(metric: Metric) -> str:
    digits = 4 if abs(metric.value) < 100 else 2
    return f"{metric.value:.{digits}f}" + ("" if metric.stderr is None else f" ± {metric.stderr:.{digits}f}")
