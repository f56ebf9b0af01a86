"""Files that are whole or not there, and that know whether they are what was written."""

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
"""Ends the name of a file or folder that is still being written, or never was to its end."""

SEALED = re.compile(rb'(?P<body>\{.*"crc32": )(?P<crc32>\d+)\n\}', re.DOTALL)


class NotAsWrittenError(ValueError):
    """The content of a file is not what was written into it."""


@contextmanager
def replaced_whole(path: Path) -> Iterator[Path]:
    """Another name, for a library to write a file by: it takes its own, and the place of an earlier one, at the end.

    If writing fails, nothing is left of it, and an earlier file is as it was.
    """
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)
    try:
        yield partial
        with partial.open("r+b") as file:
            flush(file)
        partial.replace(path)
        flush_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its name, and the place of an earlier one, when all of it is on the disk.

    If writing fails, nothing is left of it, and an earlier file is as it was.
    """
    # exclusively: a link that somebody left there is not followed
    with replaced_whole(path) as partial, partial.open("xb") as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with written_whole(path) as file:
        file.write(text.encode())


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file, whole or not at all, with a checksum of its text as the last entry; it needs another one."""
    body = json.dumps(content, indent=1).removesuffix("\n}") + ',\n "crc32": '
    write_text(path, body + f"{zlib.crc32(body.encode())}\n}}")


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote.

    Raises:
        NotAsWrittenError: the file is something else, or has changed.
        OSError: it cannot be read.
    """
    text = path.read_bytes()
    sealed = SEALED.fullmatch(text)
    if sealed is None or sealed["crc32"] != b"%d" % zlib.crc32(sealed["body"]):
        raise NotAsWrittenError("it is not what was written")
    content: dict[str, Any] = json.loads(text)
    del content["crc32"]
    return content


def descriptor_of(path: Path, flags: int) -> int:
    """Opens a file for os.read and os.write, and makes it if it is not there.

    Never through a link, which may lead to any file of this machine. Raises OSError.
    """
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def append(path: Path, content: bytes) -> None:
    """Appends all of the content to a file, and brings it onto the disk.

    Raises:
        OSError: that failed, and the file is as it was.
    """
    descriptor = descriptor_of(path, os.O_WRONLY | os.O_APPEND)
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


class ReadFile:
    """A file that is read from wherever one likes, into memory of one's own; closed when nobody holds it any more.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, position: int, size: int) -> bytes:
        """The bytes from a position on; fewer where the file ends before. Raises OSError."""
        content = b""
        while part := os.pread(self._descriptor, size - len(content), position + len(content)):
            content += part
        return content


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(file: BinaryIO) -> None:
    """Brings what was written onto the disk, so that no rename can come before it."""
    file.flush()
    os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Brings the names in a folder onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
