"""TensorBoard events that survive a full disk, and stand in the curves once."""

import logging
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

from cucafera.data.files import append

log = logging.getLogger(__name__)

EVENTS = "events.out.tfevents."
DECLARATIONS = EVENTS + "0000000000.declarations"
"""The file of what each session of a run declares anew; its name stands before those of the curves."""
FLUSH_SECONDS = 30
"""Events are flushed that often, at the next one."""


class PatientFile:
    """A file that is only appended to. What the disk does not take is kept in memory and tried again.

    What is on the disk is always a whole number of flushes: of one that failed midway nothing stays.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending = bytearray()
        self._told = False

    def write(self, content: bytes) -> None:
        """Keeps the content until the next flush."""
        self._pending += content

    def flush(self) -> None:
        """Brings all content onto the disk, or says once that it has to wait."""
        try:
            append(self.path, bytes(self._pending))
        except OSError as error:
            if not self._told:
                log.error("%s cannot be written: %s. The curves wait in memory", self.path, error.strerror or error)
            self._told = True
            return
        self._pending.clear()
        self._told = False

    def close(self) -> None:
        """Flushes; what the disk does not take now is lost, and that is told."""
        self.flush()
        if self._pending:
            log.error("%s: the curves since it could last be written are lost", self.path)


class EventFile:
    """What torch's FileWriter expects of an event file, on a PatientFile.

    Args:
        folder: Where the file goes.
        name: Its name, in place of an earlier file's; None: one that stands behind those of all earlier files.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (name or f"{EVENTS}{_stamp_after(folder)}.{os.getpid()}")
        path.unlink(missing_ok=True)
        self._file = PatientFile(path)
        self._records = RecordWriter(self._file)
        self._folder = folder
        self._flushed_at = 0.0
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def get_logdir(self) -> str:
        """The folder."""
        return str(self._folder)

    def add_event(self, event: Any) -> None:
        """Adds an event."""
        self._records.write(event.SerializeToString())
        if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Brings the events onto the disk."""
        self._file.flush()
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Flushes for the last time."""
        self._file.close()

    def reopen(self) -> None:
        """Nothing to do: the file is opened for each flush."""


def _stamp_after(folder: Path) -> str:
    """The time in seconds and nanoseconds, but later than that of any file in the folder.

    TensorBoard reads them in the order of their names, and the clock of the machine that goes on may be behind.
    """
    stamp = time.time_ns()
    for path in folder.glob(EVENTS + "*"):
        seconds, _, rest = path.name.removeprefix(EVENTS).partition(".")
        nanoseconds = rest.partition(".")[0]
        if seconds.isdecimal() and nanoseconds.isdecimal():
            stamp = max(stamp, int(seconds) * 10**9 + int(nanoseconds) + 1)
    return f"{stamp // 10**9:010d}.{stamp % 10**9:09d}"


class EventWriter(FileWriter):
    """torch's FileWriter on an EventFile."""

    def __init__(self, folder: Path) -> None:
        self.event_writer = EventFile(folder)


class EventSummaryWriter(SummaryWriter):
    """torch's SummaryWriter on an EventFile."""

    file_writer: FileWriter | None  # type: ignore[assignment]
    all_writers: dict[str, FileWriter] | None  # type: ignore[assignment]

    def _get_file_writer(self) -> FileWriter:
        if self.file_writer is None:
            writer = self.file_writer = EventWriter(Path(self.log_dir))
            self.all_writers = {writer.event_writer.get_logdir(): writer}
            if self.purge_step is not None:
                # TensorBoard drops what earlier files hold from this step on.
                start = SessionLog(status=SessionLog.START)
                writer.add_event(Event(step=self.purge_step, session_log=start))
                self.purge_step = None
        return self.file_writer


class EventLogger(TensorBoardLogger):
    """TensorBoard events, and nothing else, in the run folder.

    Args:
        folder: The run folder.
        first_step: Where the run goes on from: what a killed process wrote after it does not count.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        super().__init__(folder, name="", version="")
        self._folder = folder
        self._first_step = first_step
        self._declarations: EventFile | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The writer of this process; a dummy in all but the first of a job."""
        if self._experiment is None:
            self._experiment = EventSummaryWriter(
                str(self._folder),
                # Also for a run that begins: without its data server, TensorBoard heeds only the second start of a run.
                purge_step=self._first_step + 1,
            )
        return self._experiment

    def declare(self, *summaries: Summary) -> None:
        """Writes what belongs to this session, and takes the place of what the session before has declared.

        TensorBoard keeps the first hyperparameters and the first end that it finds in a run, so those of a session
        that did not go to its end, or had another budget, must not be there any more.
        """
        if self._declarations is None:
            self._declarations = EventFile(self._folder, DECLARATIONS)
        for summary in summaries:
            self._declarations.add_event(Event(wall_time=time.time(), summary=summary))
        self._declarations.flush()

    def save(self) -> None:
        """Flushes; Lightning would add a second file of hyperparameters beside config.yaml."""
        self.experiment.flush()
        if self._declarations is not None:
            self._declarations.flush()


def event_logger(trainer: pl.Trainer) -> EventLogger | None:
    """The logger of a run's curves; None in all but the first process of a job, and where none are written."""
    return trainer.logger if isinstance(trainer.logger, EventLogger) and trainer.is_global_zero else None
