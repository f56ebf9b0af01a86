"""Files on this machine: .jsonl, .txt and .parquet, the first two also compressed."""

import functools
import glob
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cucafera.config.errors import UserError
from cucafera.config.fields import setting
from cucafera.config.registry import SOURCES
from cucafera.config.schema import SourceConfig
from cucafera.data.compression import COMPRESSED, decompressed
from cucafera.data.sources import (
    CorpusError,
    Row,
    Source,
    SourceKind,
    SourceRow,
    bad_byte,
    fingerprint_of,
    first_line,
)

FORMATS = (".jsonl", ".txt", ".parquet")
READABLE = ".jsonl, .txt (both also compressed as .gz or .zst) and .parquet"

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CHUNK_BYTES = 1 << 20
MAX_TEXT_BYTES = 1 << 30
"""Of a line, or of a document in a .txt file: a file of a few megabytes may decompress to any size."""
BATCH_ROWS = 256
"""Rows of a parquet file in memory at a time."""


@dataclass
class FilesConfig(SourceConfig):
    """Files on this machine."""

    path: str | None = setting(
        None, "A file, folder or glob of .jsonl, .parquet or .txt, the first and last also compressed as .gz or .zst."
    )
    document_separator: str | None = setting(
        None, "Text between documents of a .txt file; null: a file is one document."
    )


class FilesSource(Source[FilesConfig]):
    """Rows of files, in the order of their paths. Sizes are bytes of the files as they are on the disk."""

    @functools.cached_property
    def files(self) -> list[Path]:
        """The files, sorted. Raises CorpusError if there is none, or one that cannot be read."""
        assert self.config.path is not None
        return _find_files(Path(self.config.path).expanduser(), self.name)

    def size_bytes(self) -> int:
        """Return the bytes of all files."""
        return sum(file.stat().st_size for file in self.files)

    def fingerprint(self) -> str:
        """Return a hash of the files' relative names, sizes and times of change, and of how they are read."""
        folder = next(parent for parent in self.files[0].parents if all(parent in file.parents for file in self.files))
        files = [
            (file.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns)
            for file, status in ((file, file.stat()) for file in self.files)
        ]
        return fingerprint_of(self.config, "files", files, self.config.document_separator)

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[SourceRow]:
        """Yield each row. One of a .txt file has only the text column, so it is refused where all are needed."""
        for path in self.files:
            if columns is None and _format(path) not in (".parquet", ".jsonl"):
                raise CorpusError(f"{self.name}: {path} is a .txt file, which has no columns: give .jsonl or .parquet")
            match _format(path):
                case ".parquet":
                    yield from self._parquet(path, columns)
                case ".jsonl":
                    yield from self._jsonl(path)
                case _:
                    yield from self._txt(path)

    @contextmanager
    def _open(self, path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
        """Yield the file as it is on the disk, whose position shows progress, and its decompressed content."""
        try:
            with path.open("rb") as raw, decompressed(raw, path) as content:
                yield raw, content
        except OSError as error:
            raise CorpusError(f"{self.name}: cannot read {path}: {error.strerror or error}") from error

    def _jsonl(self, path: Path) -> Iterator[SourceRow]:
        with self._open(path) as (raw, content):
            read = 0
            for number, line in enumerate(_lines(content, path), start=1):
                if not line.strip():
                    continue
                position = f"{path}:{number}"
                try:
                    row = _parse_line(line)
                except UserError as problem:
                    self.context.broken(position, problem)
                    continue
                yield row, raw.tell() - read, position
                read = raw.tell()

    def _txt(self, path: Path) -> Iterator[SourceRow]:
        column, separator = self.config.columns.text, self.config.document_separator
        with self._open(path) as (raw, content):
            read, line = 0, 1
            for document in _split(content, separator, path):
                try:
                    yield {column: document.decode()}, raw.tell() - read, f"{path}:{line}"
                    read = raw.tell()
                except UnicodeDecodeError as error:
                    line_of_error = line + document.count(b"\n", 0, error.start)
                    self.context.broken(f"{path}:{line_of_error}", bad_byte(error))
                line += document.count(b"\n") + (separator or "").count("\n")

    def _parquet(self, path: Path, columns: Sequence[str] | None) -> Iterator[SourceRow]:
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(path) as file:
                self.context.check_columns(str(path), columns, file.schema_arrow.names)
                size = path.stat().st_size // max(1, file.metadata.num_rows)
                number = 0
                for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                    for values in _values_of_batch(batch):
                        number += 1
                        if isinstance(values, str):
                            self.context.broken(f"{path}, row {number}", values)
                        else:
                            yield values, size, f"{path}, row {number}"
        except pyarrow.ArrowException as error:
            raise CorpusError(f"{path} is damaged or truncated: {first_line(error)}") from error
        except OSError as error:
            raise CorpusError(f"{self.name}: cannot read {path}: {error.strerror or error}") from error


@SOURCES.register
class Files(SourceKind):
    """Selected by `path`."""

    name = "path"
    config = FilesConfig
    source = FilesSource


def _find_files(path: Path, name: str) -> list[Path]:
    """Return the files of a path, folder or glob, sorted. Raises CorpusError if there is none that can be read."""
    if path.is_dir():
        visible = [file for file in path.rglob("*") if not _is_hidden(file.relative_to(path)) and file.is_file()]
        files = [file for file in visible if _format(file) is not None]  # a README next to the data is no data
        if not files:
            raise CorpusError(f"{name}: the folder {path} holds no file that can be read: {READABLE}")
        return sorted(files)
    matches = {Path(match) for match in glob.glob(str(path), recursive=True)}  # noqa: PTH207  # that of Path takes no absolute ones
    files = [path] if path.is_file() else [match for match in matches if match.is_file()]
    if not files:
        raise CorpusError(f"{name}: there is no file {path}")
    for file in files:
        if _format(file) is None:
            raise CorpusError(f"{name}: {file} has a format that cannot be read; {READABLE} can")
    return sorted(files)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _format(path: Path) -> str | None:
    """Return which of FORMATS a file has by its name, or None."""
    if path.suffix in COMPRESSED and path.with_suffix("").suffix in (".jsonl", ".txt"):
        return path.with_suffix("").suffix
    return path.suffix if path.suffix in FORMATS else None


def _lines(content: IO[bytes], path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, without a byte order mark."""
    mark = BYTE_ORDER_MARK
    while line := content.readline(MAX_TEXT_BYTES + 1):
        _check_length(line, "line", path)
        yield line.removeprefix(mark)
        mark = b""


def _split(content: IO[bytes], separator: str | None, path: Path) -> Iterator[bytes]:
    """Yield the parts of a file between separators; the last may be empty. Bytes, so that no character is cut."""
    if not separator:
        document = content.read(MAX_TEXT_BYTES + 1)
        _check_length(document, "document", path)
        yield document.removeprefix(BYTE_ORDER_MARK)
        return
    rest = content.read(CHUNK_BYTES).removeprefix(BYTE_ORDER_MARK)
    # Chunks grow with what is left over, or a document of n bytes would be copied n / CHUNK_BYTES times.
    while chunk := content.read(max(CHUNK_BYTES, len(rest))):
        *documents, rest = (rest + chunk).split(separator.encode())
        _check_length(rest, "document", path)
        yield from documents
    yield from rest.split(separator.encode())


def _check_length(text: bytes, kind: str, path: Path) -> None:
    if len(text) > MAX_TEXT_BYTES:
        raise CorpusError(f"{path} holds a {kind} of over {MAX_TEXT_BYTES >> 20:,} MiB")


def _parse_line(line: bytes) -> Row:
    """Return the object of a JSON line. Raises UserError."""
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(bad_byte(error)) from error
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise UserError("not JSON: nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"not JSON: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError("not a JSON object")
    return values


def _values_of_batch(batch: Any) -> Iterator[Row | str]:
    """Yield the columns of each row of a pyarrow batch, or what is wrong with the row."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):
        rows = []  # a row is broken: find it row by row
    yield from rows
    for number in range(len(rows), batch.num_rows):
        try:
            yield batch.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield bad_byte(error)
        except (ValueError, OverflowError) as error:  # such as a date after the year 9999
            yield first_line(error)
