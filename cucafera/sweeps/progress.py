"""The progress of a sweep on the terminal: a line for each job that ends, and one for the whole sweep.

The jobs may run in other processes or on other machines, so they append what happens to a file in the sweep folder. The
process of the sweep reads that file, and it alone prints.
"""

import atexit
import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from hydra.core.override_parser.types import Override
from tqdm import tqdm

from cucafera.output import bar_output, printable
from cucafera.quantities import duration
from cucafera.storage import open_to_append

PROGRESS_FILE = ".progress.jsonl"
"""What the jobs report, in the sweep folder."""
OUTPUT_FILE = "job.out"
"""The output of a job, in its folder."""
READ_SECONDS = 0.5
"""Between two looks at the file."""
TAIL_BYTES = 4096
"""How much of a job's output is read for its last line."""
RESULTS = ("finished", "diverged")
"""Statuses of jobs that have a result; others have failed, or were stopped."""


@dataclasses.dataclass(frozen=True)
class JobEvent:
    """The start or the end of a job.

    Attributes:
        number: Of the job within this sweep, from 0.
        label: What is swept, with its values.
        folder: Its run folder.
        time: Seconds since 1970.
        status: As in `JobRecord`, at its end; "running" at its start, and "not run".
        seconds: Time that it has taken; 0 for a job that had ended before.
        results: Its results in words; empty without any.
        cost: Its primary metric such that lower is better; None without a result.
        message: What the user should see of a job that failed.
    """

    number: int
    label: str
    folder: str
    time: float
    status: str = "running"
    seconds: float = 0.0
    results: str = ""
    cost: float | None = None
    message: str = ""

    def append(self, sweep: Path) -> None:
        """Append it to the file of a sweep, in one write, which no other job's can split."""
        line = json.dumps(dataclasses.asdict(self)) + "\n"
        with contextlib.suppress(OSError):  # a full disk: the job itself reports that
            descriptor = open_to_append(sweep / PROGRESS_FILE)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)


class SweepProgress:
    """Prints the jobs of a sweep as they end, and on a terminal a line below them that changes in place.

    Args:
        sweep: The sweep folder.
        total: The number of jobs.
    """

    def __init__(self, sweep: Path, total: int) -> None:
        self.sweep = sweep
        self.total = total
        self.running: dict[int, JobEvent] = {}
        self.ended: dict[int, JobEvent] = {}
        self._read = 0
        self._output = bar_output(sys.stdout)
        self._bar: tqdm[Any] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def start(self) -> None:
        """Print the heading, and follow the jobs that start from now on."""
        with contextlib.suppress(FileNotFoundError):
            self._read = (self.sweep / PROGRESS_FILE).stat().st_size
        jobs = f"{self.total:,} job{'s' if self.total > 1 else ''}"
        print(f"Sweep of {jobs} in {self.sweep}; the output of a job is {OUTPUT_FILE} in its folder", flush=True)
        if sys.stdout.isatty():
            self._bar = tqdm(total=0, file=self._output, bar_format="{desc}", leave=False)
        atexit.register(self.stop)
        self._thread.start()

    def stop(self) -> None:
        """Print what is left, and end."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self._show_new()
            if self._bar is not None:
                self._bar.close()

    def _follow(self) -> None:
        while not self._stop.wait(READ_SECONDS):
            self._show_new()

    def _show_new(self) -> None:
        """Print a line for each job that has ended since the last look, and then the state of the sweep."""
        lines = []
        for event in self._new_events():
            if event.status == "running":
                self.running[event.number] = event
                continue
            self.running.pop(event.number, None)
            self.ended[event.number] = event
            lines.append(job_line(event, self.total))
        if self._bar is None:
            if lines:
                print("\n".join([*lines, progress_line(self.ended, self.running, self.total, time.time())]), flush=True)
            return
        for line in lines:
            self._bar.write(line, file=self._output)  # the bar's own, or tqdm would not clear the bar before it
        text = progress_line(self.ended, self.running, self.total, time.time())
        if self.running:
            first = self.running[min(self.running)]
            text += f" | {first.number + 1}: {first.label}  {last_lines(Path(first.folder) / OUTPUT_FILE, 0, 1)}"
        self._bar.set_description_str(printable(text)[: shutil.get_terminal_size().columns - 1])

    def _new_events(self) -> list[JobEvent]:
        try:
            with (self.sweep / PROGRESS_FILE).open("rb") as file:
                file.seek(self._read)
                text = _whole_lines(file)
        except OSError:  # no job has started yet; or a network disk that comes back
            return []
        self._read += len(text)
        return [JobEvent(**json.loads(line)) for line in text.splitlines()]


def _whole_lines(file: IO[bytes]) -> bytes:
    text = file.read()
    return text[: text.rfind(b"\n") + 1]


def job_line(event: JobEvent, total: int) -> str:
    """Return the line of a job that has ended: number, what is swept, results, time, status; below it its message."""
    number = f"{event.number + 1:>{len(str(total))}}/{total}"
    taken = duration(event.seconds) if event.seconds else "before"
    cells = [number, event.label or "-", event.results, taken, event.status]
    message = "".join(f"\n    | {line}" for line in event.message.splitlines())
    return "  ".join(filter(None, cells)) + message


def progress_line(ended: Mapping[int, JobEvent], running: Mapping[int, JobEvent], total: int, now: float) -> str:
    """Return the state of a sweep: jobs that are done, left and failed, the best so far, and the time left."""
    failed = sum(event.status not in RESULTS for event in ended.values())
    parts = [f"{len(ended)} of {total} done"]
    if failed:
        parts.append(f"{failed} failed")
    if diverged := sum(event.status == "diverged" for event in ended.values()):
        parts.append(f"{diverged} diverged")
    results = [event for event in ended.values() if event.cost is not None]
    if results:
        best = min(results, key=lambda event: event.cost if event.cost is not None else math.inf)
        parts.append(f"best so far {best.label} ({best.results})")
    if (left := seconds_left(ended, running, total, now)) is not None:
        parts.append(f"about {duration(left)} left")
    return "Sweep: " + ", ".join(parts)


def seconds_left(
    ended: Mapping[int, JobEvent], running: Mapping[int, JobEvent], total: int, now: float
) -> float | None:
    """Return the time that a sweep still takes, if each job takes as long as those that ran; None if that is unknown.

    As many jobs run at once as do now; where none does, as between two jobs of one after the other, one.
    """
    taken = [event.seconds for event in ended.values() if event.seconds and event.status in RESULTS]
    if not taken or len(ended) >= total:
        return None
    mean = sum(taken) / len(taken)
    rest = [max(mean - (now - event.time), 0.0) for event in running.values()]
    waiting = total - len(ended) - len(running)
    return max([*rest, (sum(rest) + waiting * mean) / max(len(running), 1)])


def last_lines(path: Path, start: int, count: int) -> str:
    """Return the last lines of a file, after a position, that are not empty; nothing if it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join([line for line in lines if line.strip()][-count:])


def number_of_jobs(overrides: Iterable[Override], trials: int | None) -> int:
    """Return the number of jobs of a sweep: trials of a search, or the product of the numbers of values of a grid."""
    if trials is not None:
        return trials
    return math.prod(len(list(each.sweep_string_iterator())) for each in overrides if each.is_discrete_sweep())
