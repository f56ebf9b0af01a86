"""TensorBoard events that survive a full disk and a kill, without duplicate points in a curve.

Lightning's TensorBoardLogger writes through torch's SummaryWriter. The thread below it that writes the file dies at the
first failed write, drops its queue, and raises the error at the next event, which would end training. This module
replaces that file: EventLogger -> EventSummaryWriter -> EventWriter -> EventFile -> BufferedAppendFile.
"""

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

from cucafera.runs.folder import EVENTS, RunFolder
from cucafera.storage import append

log = logging.getLogger(__name__)

DECLARATIONS = EVENTS + "0000000000.declarations"
"""The file with the declarations of the current session; its name sorts before those of the curves."""
FLUSH_SECONDS = 30
"""Events are flushed with the first one after this time."""


class BufferedAppendFile:
    """A file to append to, with a buffer and retries: what cannot be written stays in memory until the next flush.

    Flushes are atomic: one that fails midway leaves nothing on the disk, so the file never ends in a partial record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending = bytearray()
        self._failure_reported = False

    def write(self, content: bytes) -> None:
        """Buffer the content until the next flush."""
        self._pending += content

    def flush(self) -> None:
        """Append the buffer to the file and sync it; report the first failure of a series, and keep the buffer."""
        try:
            append(self.path, self._pending)
        except OSError as error:
            if not self._failure_reported:
                log.error("%s cannot be written: %s. The curves wait in memory", self.path, error.strerror or error)
            self._failure_reported = True
            return
        self._pending.clear()
        self._failure_reported = False

    def close(self) -> None:
        """Flush for the last time, and report what is lost if that fails."""
        self.flush()
        if self._pending:
            log.error("%s: the curves since it could last be written are lost", self.path)


class EventFile:
    """An event file with the interface that torch's FileWriter expects, on a BufferedAppendFile.

    Args:
        folder: Folder of the file.
        name: Name of the file, which replaces an existing one; None: a name that sorts after all earlier files.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (name or f"{EVENTS}{_stamp_after(folder)}.{os.getpid()}")
        path.unlink(missing_ok=True)
        self._file = BufferedAppendFile(path)
        self._records = RecordWriter(self._file)
        self._folder = folder
        self._flushed_at = 0.0
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def get_logdir(self) -> str:
        """Return the folder."""
        return str(self._folder)

    def add_event(self, event: Any) -> None:
        """Add an event."""
        self._records.write(event.SerializeToString())
        if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the buffered events."""
        self._file.flush()
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Flush for the last time."""
        self._file.close()

    def reopen(self) -> None:
        """Do nothing: the file is opened for each flush."""


def _stamp_after(folder: Path) -> str:
    """Return the time in seconds and nanoseconds, or one just after the latest file in the folder.

    TensorBoard reads files in the order of their names, and a run may be resumed on a machine whose clock is behind.
    """
    stamp = time.time_ns()
    for path in RunFolder(folder).event_files():
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
                # SessionLog.START makes TensorBoard drop the points of earlier files from this step on.
                start = SessionLog(status=SessionLog.START)
                writer.add_event(Event(step=self.purge_step, session_log=start))
                self.purge_step = None
        return self.file_writer


class EventLogger(TensorBoardLogger):
    """Lightning's logger of TensorBoard events in the run folder, without its file of hyperparameters.

    Args:
        folder: The run folder.
        first_step: Step that the run resumes from: points that a killed process wrote after it are dropped.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        super().__init__(folder, name="", version="")
        self._folder = folder
        self._first_step = first_step
        self._declarations: EventFile | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The writer of this process; a dummy in all but the first process of a job."""
        if self._experiment is None:
            self._experiment = EventSummaryWriter(
                str(self._folder),
                # For a new run too: without its data server, TensorBoard ignores the first start of a run, and so would
                # ignore that of the first resume.
                purge_step=self._first_step + 1,
            )
        return self._experiment

    def declare(self, *summaries: Summary) -> None:
        """Write the declarations of this session, which replace those of the previous session.

        TensorBoard keeps the first hyperparameters and the first end that it finds in a run, so those of a session
        that was stopped, or had another budget, must be removed. They are in a file of their own for that.
        """
        if self._declarations is None:
            self._declarations = EventFile(self._folder, DECLARATIONS)
        for summary in summaries:
            self._declarations.add_event(Event(wall_time=time.time(), summary=summary))
        self._declarations.flush()

    def save(self) -> None:
        """Flush; Lightning's method would also write hparams.yaml, a second copy of config.yaml."""
        self.experiment.flush()
        if self._declarations is not None:
            self._declarations.flush()


def event_logger(trainer: pl.Trainer) -> EventLogger | None:
    """Return the logger of a run's curves; None in all but the first process of a job, and where none are written."""
    return trainer.logger if isinstance(trainer.logger, EventLogger) and trainer.is_global_zero else None
