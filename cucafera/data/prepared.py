"""Prepared data: folders that are made once, whole or not at all, and shared by every run that needs the same."""

import errno
import fcntl
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cucafera.config import UserError
from cucafera.data.files import PARTIAL, NotAsWrittenError, descriptor_of, read_sealed

log = logging.getLogger(__name__)

SUMMARY = "prepared.json"
"""Written last: a prepared folder that has it is whole."""

SECONDS_BETWEEN_LINES = 10


class PreparedDataError(UserError):
    """Prepared data that is not there, damaged, or made for something else."""


def prepare_once(name: str, folder: Path, fill: Callable[[Path], None]) -> dict[str, Any]:
    """Makes a folder, unless it is there. Of several programs that want the same one makes it, and the others wait.

    Args:
        name: What it is made of: a source's key in the configuration, or `tokenizer`, for messages.
        folder: Is made.
        fill: Fills the folder that it is given, with SUMMARY as the last file. What it leaves when it fails is removed.

    Returns:
        The content of SUMMARY.

    Raises:
        UserError: the folder cannot be written, or what `fill` raises.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(folder.name + ".lock")):
            if not (folder / SUMMARY).exists():
                if folder.exists():
                    raise PreparedDataError(f"{folder} is not whole: it has no {SUMMARY}. {start_again(folder)}")
                if partial.exists():  # of a run that was killed
                    shutil.rmtree(partial)
                try:
                    fill(partial)
                except BaseException:
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
                partial.rename(folder)
            return read_summary(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    except BrokenProcessPool as error:
        raise PreparedDataError(
            f"{name}: a process that tokenizes was killed, perhaps for want of memory. "
            "Set data.processes to a smaller number and start again"
        ) from error


def read_summary(folder: Path) -> dict[str, Any]:
    """The content of SUMMARY in a folder that was made. Raises PreparedDataError if it is not there, or damaged."""
    try:
        return read_sealed(folder / SUMMARY)
    except FileNotFoundError as error:
        raise PreparedDataError(f"{folder} holds no prepared data: it has no {SUMMARY}") from error
    except NotAsWrittenError as error:
        raise damaged(folder / SUMMARY, str(error)) from error


def start_again(folder: Path) -> str:
    """What to do about prepared data that cannot be used."""
    owner = folder.parent if (folder.parent / SUMMARY).exists() else folder
    return f"Delete the folder {owner}: it is prepared again at the next start"


def damaged(path: Path, problem: str) -> PreparedDataError:
    """The error that a prepared file is not what was written."""
    return PreparedDataError(f"{path} is damaged: {problem}. {start_again(path.parent)}")


def _cannot_write(folder: Path, error: OSError) -> PreparedDataError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some, or set data.prepared_dir to a folder on a larger disk" if full else "set data.prepared_dir"
    return PreparedDataError(f"cannot write prepared tokens to {folder}: {error.strerror or error}; {remedy}")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process of this machine at a time."""
    descriptor = descriptor_of(path, os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("Another process is preparing %s: waiting for it", path.with_suffix(""))
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class PreparationProgress:
    """A bar on a terminal; elsewhere a line now and then. Both on stderr.

    Args:
        title: What is being done.
        total_bytes: Bytes of input in all; None where nobody knows.
    """

    def __init__(self, title: str, total_bytes: int | None) -> None:
        self._title = title
        self._tokens = 0
        self._text_bytes = 0
        self._started = self._last_line = time.monotonic()
        self._on_terminal = sys.stderr.isatty()
        self._bar = tqdm(desc=title, total=total_bytes, unit="B", unit_scale=True, disable=not self._on_terminal)

    def __enter__(self) -> "PreparationProgress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._bar.close()
        if kind is None and not self._on_terminal:
            self._line()

    def advance(self, input_bytes: int, text_bytes: int, tokens: int) -> None:
        """Counts input that was read, and what became of it."""
        self._tokens += tokens
        self._text_bytes += text_bytes
        self._bar.set_postfix_str(self._figures(), refresh=False)
        self._bar.update(input_bytes)
        if not self._on_terminal and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._line()

    def _figures(self) -> str:
        megabytes = self._text_bytes / 1e6
        speed = megabytes / (time.monotonic() - self._started)
        return f"{megabytes:,.1f} MB of text, {self._tokens:,} tokens, {speed:.1f} MB/s"

    def _line(self) -> None:
        self._last_line = time.monotonic()
        print(f"{self._title}: {self._figures()}", file=sys.stderr)
