"""Everything that the program prints and logs: outputs that cannot end it, without raw control characters.

Every command calls `protect_output` at its start. From then on, whatever is printed or logged, by this package or by
another, passes through `Output`: texts may come from data, from a model or from a foreign file, and standard output may
be a pipe whose reader has left, a full disk or a terminal that was closed.
"""

import atexit
import contextlib
import errno
import io
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast

from cucafera.storage import open_to_append

log = logging.getLogger(__name__)

EXIT_OUTPUT_LOST = 1
"""Of a command whose purpose is what it prints, when that cannot be written."""
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 but newline and tab, DEL, C1, line separators, bidirectional controls, and halves of surrogate pairs."""
BAR_MOVES = re.compile(r"\r|(\x1b\[A)+\Z")
"""The cursor movements with which tqdm begins a write: to the start of the line, or some lines up."""
SILENT_SECONDS = 5.0
"""Longest time without a sign of life in a terminal."""
GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ESTALE)
"""Errors of an output that does not come back; a disk that is full may have space again."""


def printable(text: str) -> str:
    r"""Return a text with every control character as an escape such as `\x1b`, except for newlines and tabs."""
    return CONTROL.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    number = ord(match[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


class Output:
    """Standard output or standard error: writing to it never fails, and prints no control characters.

    Characters that its encoding lacks are printed as escapes. What cannot be written is dropped, which is logged once.

    Args:
        stream: The stream to write to.
        name: Its name in messages.

    Attributes:
        is_required: Losing it ends the command, by SystemExit.
        lost: Why it cannot be written; None while it can.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self.is_required = False
        self.lost: str | None = None
        self._is_reported = False
        if isinstance(stream, io.TextIOWrapper):
            try:
                stream.reconfigure(errors="backslashreplace", line_buffering=True)
            except (OSError, ValueError) as error:  # it first writes what was printed before
                self.lose(error)

    def write(self, text: str) -> int:
        """Write, if that is possible."""
        self._send(printable(text))
        return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        self._send("", flush=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _send(self, text: str, flush: bool = False) -> None:
        try:
            self._stream.write(text)
            if flush:
                self._stream.flush()
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self.lose(error)

    def lose(self, error: OSError | ValueError) -> None:
        """Continue without the output; or end the command, if it is required."""
        why = getattr(error, "strerror", None) or str(error)
        if not isinstance(error, OSError) or error.errno in GONE:
            self.detach()
        is_first, self.lost = self.lost is None, why
        if self.is_required and is_first:
            if not isinstance(error, BrokenPipeError):  # else its reader, such as `head`, has all that it wants
                print(f"{self._name} cannot be written: {why}", file=sys.stderr)
            sys.exit(EXIT_OUTPUT_LOST)
        self.report()

    def detach(self) -> None:
        """Send the rest to the null device, with what is buffered: the interpreter would fail to write it at exit.

        The descriptor itself is redirected, for libraries in C and for processes that are started later.
        """
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            self._stream.flush()
        except (OSError, ValueError):  # a stream without a descriptor
            self._stream = io.StringIO()

    def report(self) -> None:
        """Log once that the output is lost, as soon as there is a log."""
        if self.lost is not None and not self._is_reported and logging.getLogger().handlers:
            self._is_reported = True
            log.warning("%s cannot be written: %s. The log continues without it", self._name, self.lost)

    def end(self) -> None:
        """Flush for the last time; what cannot be written then is lost."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self.detach()


class BarOutput:
    """An output for progress bars, whose cursor movements are the only control characters that it keeps.

    Args:
        output: The output below it.
    """

    def __init__(self, output: Output) -> None:
        self._output = output

    def write(self, text: str) -> int:
        """Write, if that is possible."""
        moves = BAR_MOVES.match(text)
        end = moves.end() if moves else 0
        self._output._send(text[:end] + printable(text[end:]))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)


def bar_output(stream: TextIO) -> TextIO:
    """Return the output for a progress bar on a stream."""
    return cast(TextIO, BarOutput(stream)) if isinstance(stream, Output) else stream


def protect_output(is_required: bool = False) -> None:
    """Make standard output and standard error outputs that cannot end this process; see `Output`.

    Args:
        is_required: The command's purpose is what it prints: losing standard output ends it, with EXIT_OUTPUT_LOST.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # the next file that is opened would get it, and with it what libraries in C print
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, words in (("stdout", "Standard output"), ("stderr", "Standard error")):
        stream = getattr(sys, name)
        if not isinstance(stream, Output | BarOutput):
            output = Output(stream or Path(os.devnull).open("w"), words)  # noqa: SIM115
            output.lost = None if stream else "it was closed at the start"
            atexit.register(output.end)
            # Libraries draw their bars on standard error.
            stream = bar_output(output) if name == "stderr" and output.isatty() else output  # type: ignore[arg-type]
            setattr(sys, name, stream)
        if name == "stdout":
            stream.is_required = is_required


@contextlib.contextmanager
def announced(what: str, stream: TextIO) -> Iterator[None]:
    """Print at once what the block does, and how long it has lasted every few seconds, so that it is never silent.

    Args:
        what: A line without its end.
        stream: Where it is printed; on one that is not a terminal, only the line.
    """
    print(f"{what} ...", file=stream, flush=True)
    is_done = threading.Event()

    def count() -> None:
        start = time.monotonic()
        while not is_done.wait(SILENT_SECONDS):
            print(f"... {time.monotonic() - start:.0f} s", file=stream, flush=True)

    thread = threading.Thread(target=count, daemon=True)
    if is_terminal(stream):
        thread.start()
    try:
        yield
    finally:
        is_done.set()


def is_terminal(stream: TextIO | None) -> bool:
    """True for a stream of a terminal; a standard stream may be closed, or None."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # it was closed
        return False


def notify(message: str) -> None:
    """Print a message on standard error from a signal handler, whatever the signal has interrupted.

    os.write is async-signal-safe. Outputs and the log are not: their locks may be held.
    """
    with contextlib.suppress(OSError):  # the terminal may be closed
        os.write(sys.stderr.fileno(), f"\n{message}\n".encode())


def report_lost_output() -> None:
    """Log which outputs were lost before there was a log."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Output | BarOutput):
            stream.report()


class RunLog(logging.FileHandler):
    """The handler of run.log: without control characters, and a disk that fails does not end the run.

    A symlink at its path is not followed.
    """

    _is_failing = False

    def _open(self) -> io.TextIOWrapper:
        return os.fdopen(open_to_append(Path(self.baseFilename)), "a", encoding="utf-8")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return printable(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Report the first failure of a series; what is buffered is written later if the disk comes back."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._is_failing:
            self._is_failing = True
            path = Path(self.baseFilename)
            print(f"{path} cannot be written: {error.strerror or error}. The run continues without it", file=sys.stderr)

    def flush(self) -> None:
        """Flush; after it succeeds, a failure is reported again."""
        super().flush()
        self._is_failing = False
