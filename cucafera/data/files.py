"""Files that are whole or not there, and that know whether they are what was written."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial"
"""Ends the name of a file or folder that is still being written, or never was to its end."""


class NotAsWrittenError(ValueError):
    """The content of a file is not what was written into it."""


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its name, and the place of an earlier one, when all of it is on the disk.

    If that fails, nothing is left, and an earlier file is as it was.
    """
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)
    try:
        with partial.open("xb") as file:  # exclusively: a link that somebody left there is not followed
            yield file
            flush(file)
        partial.replace(path)
        flush_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with written_whole(path) as file:
        file.write(text.encode())


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file, whole or not at all, with a checksum of itself as its last entry."""
    write_text(path, json.dumps({**content, "crc32": _checksum(content)}, indent=1))


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote.

    Raises:
        NotAsWrittenError: the file is something else, or has changed.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise NotAsWrittenError(f"it is not JSON ({error})") from error
    if not isinstance(content, dict) or content.pop("crc32", None) != _checksum(content):
        raise NotAsWrittenError("it is not what was written")
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


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())
