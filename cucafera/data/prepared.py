"""Prepared data: folders that are created once, atomically, and shared by every run that needs the same content."""

import contextlib
import errno
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from cucafera.config.errors import UserError
from cucafera.quantities import data_size, number_of
from cucafera.storage import PARTIAL, ChecksumError, list_folder, read_json_with_checksum

log = logging.getLogger(__name__)

SUMMARY = "prepared.json"
"""The file that is written last: a prepared folder that has it is complete."""

SECONDS_BETWEEN_LINES = 10


class PreparedDataError(UserError):
    """Prepared data that is missing, damaged, or made for something else."""


def prepare_once(name: str, folder: Path, fill: Callable[[Path], None]) -> dict[str, Any]:
    """Create a folder unless it exists. Of several processes that need it, one creates it while the others wait.

    A complete folder is only read: it may be on a disk that cannot be written.

    Args:
        name: The source's key in the configuration, or `tokenizer`, for messages.
        folder: The folder to create.
        fill: Fills the folder at the path that it is called with, SUMMARY last. If it fails, that folder is removed.

    Returns:
        The content of SUMMARY.

    Raises:
        UserError: the folder cannot be written or read, or `fill` raised it.
    """
    try:
        if not (folder / SUMMARY).exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _lock(folder.with_name(folder.name + ".lock")):
                _fill(folder, fill)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    except BrokenProcessPool as error:
        raise PreparedDataError(
            f"{name}: a process that tokenizes was killed, possibly because memory ran out. "
            "Set data.processes to a smaller number and start again"
        ) from error
    return read_summary(folder)


def _fill(folder: Path, fill: Callable[[Path], None]) -> None:
    """Create a folder atomically, unless another process has created it while this one waited for the lock."""
    if (folder / SUMMARY).exists():
        return
    if folder.exists():
        raise PreparedDataError(f"{folder} is incomplete: it has no {SUMMARY}. {start_again(folder)}")
    partial = folder.with_name(folder.name + PARTIAL)
    if partial.exists():  # left by a process that was killed
        shutil.rmtree(partial)
    try:
        fill(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(folder)


def prepared_folders(prepared: Path, prefix: str) -> list[Path]:
    """Return the complete folders of prepared data whose names begin so. Raises PreparedDataError if one is unseen."""
    try:
        found = [path for path in list_folder(prepared) if path.name.startswith(prefix)]
        return [path for path in found if path.is_dir() and (path / SUMMARY).exists()]
    except OSError as error:
        raise PreparedDataError(f"{error.filename or prepared} cannot be read: {error.strerror or error}") from error


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the content of SUMMARY of a prepared folder. Raises PreparedDataError if it is missing or damaged."""
    try:
        return read_json_with_checksum(folder / SUMMARY)
    except FileNotFoundError as error:
        raise PreparedDataError(f"{folder} holds no prepared data: it has no {SUMMARY}") from error
    except ChecksumError as error:
        raise damaged(folder / SUMMARY, str(error)) from error
    except OSError as error:
        raise PreparedDataError(f"{folder / SUMMARY} cannot be read: {error.strerror or error}") from error


def start_again(folder: Path) -> str:
    """Return the advice for prepared data that cannot be used."""
    owner = folder.parent if (folder.parent / SUMMARY).exists() else folder
    return f"Delete the folder {owner}: it is prepared again at the next start"


def damaged(path: Path, problem: str) -> PreparedDataError:
    """Return the error of a damaged prepared file."""
    return PreparedDataError(f"{path} is damaged: {problem}. {start_again(path.parent)}")


def _cannot_write(folder: Path, error: OSError) -> PreparedDataError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some, or set" if full else "set"
    return PreparedDataError(
        f"cannot write prepared tokens to {folder}: {error.strerror or error}; {remedy} "
        f"data.prepared_dir to a folder {'on a larger disk' if full else 'that can be written'}"
    )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock between processes; it is released when its owner dies. A symlink at `path` is not followed."""
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("Another process is preparing %s: waiting for it", path.with_suffix(""))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class PreparationProgress:
    """Progress on stderr: a bar on a terminal, elsewhere a line every few seconds.

    Args:
        title: The name of the work.
        total_bytes: Bytes of input in total; None if unknown.
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
        """Count input that was read.

        Args:
            input_bytes: Bytes of the files, as stored.
            text_bytes: Bytes of the texts in them, in UTF-8.
            tokens: Tokens of those texts; 0 if they are only read.
        """
        self._tokens += tokens
        self._text_bytes += text_bytes
        self._bar.set_postfix_str(self._figures(), refresh=False)
        self._bar.update(input_bytes)
        if not self._on_terminal and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._line()

    def _figures(self) -> str:
        speed = self._text_bytes / (time.monotonic() - self._started)
        tokens = f"{number_of(self._tokens, 'token')}, " if self._tokens else ""
        return f"{data_size(self._text_bytes)} of text, {tokens}{data_size(speed)}/s"

    def _line(self) -> None:
        self._last_line = time.monotonic()
        with contextlib.suppress(OSError, ValueError):  # standard error may be closed
            print(f"{self._title}: {self._figures()}", file=sys.stderr)
