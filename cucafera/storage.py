"""Atomic writes, JSON files with a checksum, and files that are never opened through a symlink."""

import hashlib
import json
import os
import re
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial"
"""Suffix of the name of a file or folder while it is being written; of one that was interrupted, it stays."""

JSON_WITH_CHECKSUM = re.compile(rb'(?P<body>\{.*"crc32": )(?P<crc32>\d+)\n\}', re.DOTALL)


class ChecksumError(ValueError):
    """The content of a file differs from what was written to it."""


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
    text = path.read_bytes()
    match = JSON_WITH_CHECKSUM.fullmatch(text)
    if match is None or match["crc32"] != b"%d" % zlib.crc32(match["body"]):
        raise ChecksumError("checksum mismatch")
    content: dict[str, Any] = json.loads(text)
    del content["crc32"]
    return content


def append(path: Path, content: bytes) -> None:
    """Append to a file, all or nothing, and flush it to disk. A symlink at `path` is not followed.

    Raises:
        OSError: that failed, and the file is as it was.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


class PositionalFile:
    """A file for positional reads (pread) that copy into process memory; closed when it is garbage-collected.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)

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
