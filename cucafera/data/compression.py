"""Decompression of .gz, .zst, .bz2 and .xz files while they are read."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cucafera.data.sources import CorpusError

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
BUFFER_BYTES = 1 << 20


@contextmanager
def decompressed(raw: io.BufferedReader, path: Path) -> Iterator[io.BufferedReader]:
    """Yield the content of a file, decompressed if its name ends with one of COMPRESSED, in letters of any case.

    Raises:
        CorpusError: While reading: the file is damaged or truncated.
    """
    suffix = path.suffix.lower()
    if suffix in COMPRESSED and not raw.peek(1):
        raise CorpusError(f"{path} is truncated: it is empty. Download it again")
    if suffix == ".gz":
        with gzip.GzipFile(fileobj=raw) as content:
            try:
                yield io.BufferedReader(content, BUFFER_BYTES)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise CorpusError(f"{path} is damaged or truncated: {error}. Download it again") from error
    elif suffix in (".bz2", ".xz"):
        with (bz2.BZ2File if suffix == ".bz2" else lzma.LZMAFile)(raw) as content:
            try:
                yield io.BufferedReader(content, BUFFER_BYTES)
            except (EOFError, lzma.LZMAError, OSError) as error:
                if getattr(error, "errno", None) is not None:
                    raise
                raise CorpusError(f"{path} is damaged or truncated: {error}. Download it again") from error
    elif suffix == ".zst":
        yield io.BufferedReader(_ZstdReader(raw, path), BUFFER_BYTES)
    else:
        yield raw


class _ZstdReader(io.RawIOBase):
    """Content of a .zst file of one or more frames.

    The library's own stream reader takes the end of a truncated file for the end of its content.
    """

    def __init__(self, raw: io.BufferedReader, path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise CorpusError(f"{path}: to read .zst, install it: pip install '.[zstd]'") from error
        self._library = zstandard
        self._raw = raw
        self._path = path
        self._frame: Any = None
        self._compressed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            self._compressed = self._compressed or self._raw.read(BUFFER_BYTES // 8)
            if not self._compressed:
                if self._frame is not None:
                    raise CorpusError(f"{self._path} is truncated: its last frame has no end. Download it again")
                return 0
            self._decompress()
        size = min(len(buffer), len(self._content))
        buffer[:size] = self._content[:size]
        self._content = self._content[size:]
        return size

    def _decompress(self) -> None:
        """Decompress what has been read, up to the end of its frame."""
        if self._frame is None:
            # Files written with `zstd --long=31` need more than the default window.
            self._frame = self._library.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        try:
            self._content = memoryview(self._frame.decompress(self._compressed))
        except self._library.ZstdError as error:
            raise CorpusError(f"{self._path} is damaged: {error}. Download it again") from error
        self._compressed = b""
        if self._frame.eof:
            self._compressed = self._frame.unused_data
            self._frame = None
