"""Atomic writes, JSON files with a checksum, files that are never written through a symlink, and reads with a limit."""

import errno
import hashlib
import json
import os
import re
import stat
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from cucafera.quantities import number_of

PARTIAL = ".partial"
"""Suffix of the name of a file or folder while it is being written; of one that was interrupted, it stays."""

JSON_WITH_CHECKSUM = re.compile(rb'(?P<body>\{.*"crc32": )(?P<crc32>\d+)\n\}', re.DOTALL)


SMALL_FILE_BYTES = 1 << 26
"""Largest size of a file that `read_small_file` reads into memory."""
LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""May be half of a character in JSON, which no output can encode."""


class ChecksumError(ValueError):
    """The content of a file differs from what was written to it."""


def read_small_file(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: it cannot be read; or it is something else, such as a pipe, which would block; or it has more than
            SMALL_FILE_BYTES.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        size = _regular_size(descriptor, path)
        if size > SMALL_FILE_BYTES:
            problem = f"it has {number_of(size, 'byte')}, and a file of its kind has at most {SMALL_FILE_BYTES:,}"
            raise OSError(errno.EFBIG, problem, str(path))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(size)
    finally:
        os.close(descriptor)


def _regular_size(descriptor: int, path: Path) -> int:
    """Return the size of an open file. Raises OSError if it is not a regular file."""
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.ENXIO, "it is not a regular file", str(path))
    return status.st_size


def parse_json(content: bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError, also for one that is nested too deeply."""
    try:
        value = json.loads(content)
        if LONE_SURROGATE.search(content):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def list_folder(folder: Path) -> list[Path]:
    """Return the paths in a folder, sorted; none if there is no such folder.

    `Path.glob` takes a folder that cannot be read, or a symlink to a disk that is not mounted, for an empty one.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return sorted(folder / name for name in os.listdir(folder))  # noqa: PTH208  # iterdir is lazy in later versions
    except FileNotFoundError:
        if not folder.is_symlink():
            return []
        problem = f"it is a symlink to {folder.readlink()}, which is not there"
        raise FileNotFoundError(errno.ENOENT, problem, str(folder)) from None


@contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a library to write to; on success, rename it to `path`, replacing an earlier file.

    If writing fails, the temporary file is removed, and an earlier file is left as it was.
    """
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)
    try:
        yield partial
        with partial.open("r+b") as file:
            flush(file)
        partial.replace(path)
        fsync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write to, which replaces an earlier one at `path` when all of it is on disk.

    If writing fails, nothing is left of it, and an earlier file is left as it was.
    """
    # "x" is O_CREAT | O_EXCL: never follow an existing symlink
    with atomic_replace(path) as partial, partial.open("xb") as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json_with_checksum(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically, with the CRC-32 of its text as the last entry. `content` must not be empty."""
    body = json.dumps(content, indent=1).removesuffix("\n}") + ',\n "crc32": '
    write_text(path, body + f"{zlib.crc32(body.encode())}\n}}")


def read_json_with_checksum(path: Path) -> dict[str, Any]:
    """Return the content that `write_json_with_checksum` wrote.

    Raises:
        ChecksumError: the file was changed, or was not written by that function.
        OSError: it cannot be read.
    """
    text = read_small_file(path)
    match = JSON_WITH_CHECKSUM.fullmatch(text)
    if match is None or match["crc32"] != b"%d" % zlib.crc32(match["body"]):
        raise ChecksumError("checksum mismatch")
    try:
        content: dict[str, Any] = parse_json(text)
    except ValueError as error:
        raise ChecksumError(str(error)) from error
    del content["crc32"]
    return content


def open_to_append(path: Path) -> int:
    """Return a descriptor that appends to a regular file, which is created if it is not there.

    Raises:
        OSError: it cannot be opened, or it is a symlink or something else that is no regular file.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if path.is_symlink():
            raise OSError(errno.ELOOP, "it is a symlink, which is not followed", str(path)) from error
        raise
    try:
        _regular_size(descriptor, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def append(path: Path, content: bytes | bytearray) -> None:
    """Append to a file, all or nothing, and flush it to disk. A symlink at `path` is not followed.

    Raises:
        OSError: that failed, and the file is as it was.
    """
    descriptor = open_to_append(path)
    try:
        size = os.fstat(descriptor).st_size
        try:
            written = 0
            with memoryview(content) as left:  # released here, since a bytearray cannot change while it is viewed
                while written < len(left):
                    written += os.write(descriptor, left[written:])
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, as `append` does; after a newline if the last line has none, as after a crash.

    Raises:
        OSError: that failed, and the file is as it was.
        ValueError: the path has a null byte, or the line has what UTF-8 cannot encode.
    """
    content = line.encode() + b"\n"
    append(path, b"\n" + content if _has_partial_line(path) else content)


def _has_partial_line(path: Path) -> bool:
    """Return True if a file has a last line without a newline."""
    try:
        file = PositionalFile(path)
    except FileNotFoundError:
        return False
    return file.size > 0 and file.read(file.size - 1, 1) != b"\n"


class PositionalFile:
    """A regular file for positional reads (pread) that copy into process memory; closed when it is garbage-collected.

    Raises:
        OSError: it cannot be opened; or it is something else, such as a pipe, which would block.

    Attributes:
        size: Bytes that it had when it was opened.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self.size = _regular_size(self._descriptor, path)

    def read(self, position: int, size: int) -> bytes:
        """Return `size` bytes from a position on; fewer if the file ends before. Raises OSError."""
        content = b""
        while part := os.pread(self._descriptor, size - len(content), position + len(content)):
            content += part
        return content


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(file: BinaryIO) -> None:
    """Flush a file to disk, so that a rename that follows cannot become durable before its content."""
    file.flush()
    os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk: names that were created, renamed or removed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
