"""Where documents and rows come from: files on this machine, the Hugging Face hub, and the texts of this package.

Each reader yields (document or row, bytes): what was read, and the bytes of input since the one before.
What cannot be read is answered with its place, or left out and counted where the user asked for that.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from cucafera.config import SourceConfig, UserError

Document = tuple[str, int]
Row = dict[str, Any]
T = TypeVar("T")

FORMATS = (".jsonl", ".txt", ".parquet")
PACKINGS = (".gz", ".zst")
SUFFIXES = ".jsonl, .txt (both also packed as .gz or .zst) and .parquet"

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
CHUNK_BYTES = 1 << 20
LONGEST = 1 << 30
"""Bytes of a line, or of a document in a .txt file."""
ROWS = 256
"""Rows of parquet and Hugging Face data that are in memory at a time."""


class CorpusError(UserError):
    """Text that is not there or cannot be read."""


class _UnreadableError(UserError):
    """Why one line or row is no document."""


class _TooLongError(Exception):
    """A piece of text that would not fit memory: a file of a few megabytes may unpack to any size."""

    def __init__(self, what: str) -> None:
        self.what = what


class Called(NamedTuple):
    """What the user calls a source and what can be set about it, for messages."""

    source: str
    column: str
    """What to do about a column that is not there."""
    broken: str
    """What to do about a line that cannot be read."""
    path: str
    """What names the file."""


def _called(name: str | Called) -> Called:
    if isinstance(name, Called):
        return name
    key = f"data.sources.{name}"
    broken = "Mend it, or set data.skip_broken_lines=true to leave it out"
    return Called(key, f"set {key}.column", broken, "the path of a source in data.sources")


@dataclass
class ReadCounts:
    """What a pass over a source met."""

    documents: int = 0
    """Documents or rows that were read."""
    empty: int = 0
    """Documents left out because they are null, empty or only whitespace."""
    broken: int = 0
    """Lines left out because they cannot be read."""
    first_broken: str = ""
    """Where the first of those is, and what is wrong with it."""


def read_documents(
    name: str | Called, source: SourceConfig, skip_broken_lines: bool, counts: ReadCounts
) -> Iterator[Document]:
    """Yields each document of a source, and the bytes of input it took to get there, for progress.

    Args:
        name: The source's name in the configuration, for messages; or, for another door, what it is called there.
        source: Where it is.
        skip_broken_lines: Leave out and count what cannot be read.
        counts: Is kept up to date while reading.

    Raises:
        CorpusError: the source is not there, has no such column, or holds something that cannot be read.
    """
    reader = _Reader(_called(name), source, skip_broken_lines, counts)
    read = 0
    for text, size in reader.documents():
        read += size
        if text is None or not text.strip():
            counts.empty += 1
            continue
        counts.documents += 1
        yield text, read
        read = 0


def read_rows(
    name: str | Called, source: SourceConfig, skip_broken_lines: bool, counts: ReadCounts, convert: Callable[[Row], T]
) -> Iterator[tuple[T, int]]:
    """Yields what `convert` makes of each row of a source, and the bytes of input it took to get there.

    Args:
        name, source, skip_broken_lines, counts: As for `read_documents`; a source of rows is no .txt file.
        convert: Gets the columns of a row by name; raises UserError for a row that cannot be used, which is then
            treated like a line that cannot be read.

    Raises:
        CorpusError: the source is not there, or holds something that cannot be read.
    """
    reader = _Reader(_called(name), source, skip_broken_lines, counts)
    for converted, size in reader.converted(reader.rows(), convert):
        counts.documents += 1
        yield converted, size


def source_bytes(source: SourceConfig) -> int | None:
    """Bytes of input that reading a source will take; None where there are no files to ask.

    Raises:
        CorpusError: no file is there.
    """
    if source.path is not None:
        return sum(file.stat().st_size for file in _files(source.path))
    return None


def source_fingerprint(source: SourceConfig) -> str:
    """A hash that changes when the content of a source may have changed.

    Files count by relative name, size and time of change; a Hugging Face dataset by name and revision, so without
    a revision new content on the hub is not noticed.

    Raises:
        CorpusError: no file is there.
    """
    parts: list[Any]
    if source.path is not None:
        found = _files(source.path)
        base = _common_folder(found)
        listed = [(file.relative_to(base).as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for file in found]
        parts = ["files", listed, source.column, source.document_separator]
    elif source.dataset is not None:
        parts = ["dataset", source.dataset, source.subset, source.split, source.revision, source.column]
    else:
        files = (embedded_corpus(), embedded_conversations())
        parts = ["embedded", [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out share.

    The hash of the text alone decides: a document stays on its side whatever is added to the corpus, and copies of
    it are all on the same side.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def embedded_corpus() -> Traversable:
    """The Catalan corpus of this package: jsonl with title, genre and text."""
    return resources.files("cucafera").joinpath("corpora/catalan.jsonl")


def embedded_conversations() -> Traversable:
    """The Catalan conversations of this package: jsonl with topic and messages."""
    return resources.files("cucafera").joinpath("corpora/conversations.jsonl")


class _Reader:
    """One pass over one source, by documents or by rows."""

    def __init__(self, called: Called, source: SourceConfig, skip_broken_lines: bool, counts: ReadCounts) -> None:
        self.called = called
        self.key = called.source
        self.source = source
        self.skip_broken_lines = skip_broken_lines
        self.counts = counts

    def documents(self) -> Iterator[tuple[str | None, int]]:
        """Each document with the bytes of input it took; None for one that is null, to be counted."""
        if self.source.path is not None:
            for file in _files(self.source.path, self.called.path):
                yield from self._file(file)
        elif self.source.dataset is not None:
            yield from self.converted(self._rows_of_dataset(self.source.column), self._text_of_row)
        else:
            with embedded_corpus().open("rb") as lines:
                for line in lines:
                    row = json.loads(line)
                    yield f"{row['title']}\n\n{row['text']}", len(line)

    def rows(self) -> Iterator[tuple[str, Row, int]]:
        """Each row with its place, for messages, and the bytes of input it took."""
        if self.source.path is not None:
            for file in _files(self.source.path, self.called.path):
                yield from self._rows_of_file(file)
        elif self.source.dataset is not None:
            yield from self._rows_of_dataset(None)
        else:
            with embedded_conversations().open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    yield f"embedded conversation {number}", json.loads(line), len(line)

    def converted(self, rows: Iterable[tuple[str, Row, int]], convert: Callable[[Row], T]) -> Iterator[tuple[T, int]]:
        """What `convert` makes of rows, and the bytes since the one before; where it raises UserError, it is broken."""
        read = 0
        for place, row, size in rows:
            read += size
            try:
                result = convert(row)
            except UserError as problem:
                self._unreadable(place, problem)
                continue
            yield result, read
            read = 0

    def _unreadable(self, place: str, problem: object) -> None:
        """Counts what stands at a place as broken, or stops there."""
        if not self.skip_broken_lines:
            raise CorpusError(f"{place}: {problem}. {self.called.broken}")
        if not self.counts.broken:
            self.counts.first_broken = f"{place}: {problem}"
        self.counts.broken += 1

    def _file(self, path: Path) -> Iterator[tuple[str | None, int]]:
        if _format(path) == ".parquet":
            yield from self._parquet(path)
        elif _format(path) == ".jsonl":
            yield from self.converted(self._jsonl(path), self._text_of_row)
        else:
            with self._opened(path) as (raw, content):
                position = 0
                for text in self._txt(path, content):
                    yield text, raw.tell() - position
                    position = raw.tell()

    def _rows_of_file(self, path: Path) -> Iterator[tuple[str, Row, int]]:
        if _format(path) == ".txt":
            raise CorpusError(f"{path} is a .txt file, which has no columns: give .jsonl or .parquet")
        yield from self._rows_of_parquet(path) if _format(path) == ".parquet" else self._jsonl(path)

    @contextmanager
    def _opened(self, path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
        """The file as it lies on disk, whose position shows progress, and its unpacked content."""
        try:
            with path.open("rb") as raw, _unpacked(raw, path) as content:
                yield raw, content
        except OSError as error:
            raise CorpusError(f"{self.key}: cannot read {path}: {error.strerror or error}") from error
        except _TooLongError as error:
            raise CorpusError(f"{self.key}: {path} holds a {error.what} of over {LONGEST >> 20:,} MiB") from error

    def _jsonl(self, path: Path) -> Iterator[tuple[str, Row, int]]:
        with self._opened(path) as (raw, content):
            position = 0
            for number, line in enumerate(_lines(content), start=1):
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                try:
                    row = _row_of_line(line)
                except _UnreadableError as problem:
                    self._unreadable(place, problem)
                    continue
                yield place, row, raw.tell() - position
                position = raw.tell()

    def _txt(self, path: Path, content: IO[bytes]) -> Iterator[str | None]:
        number = 1
        for document in _split(content, self.source.document_separator):
            try:
                yield document.decode()
            except UnicodeDecodeError as error:
                line = number + document.count(b"\n", 0, error.start)
                self._unreadable(f"{path}:{line}", _bad_byte(error))
            number += document.count(b"\n") + (self.source.document_separator or "").count("\n")

    @contextmanager
    def _parquet_file(self, path: Path) -> Iterator[Any]:
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(path) as file:
                yield file
        except pyarrow.ArrowException as error:
            raise CorpusError(f"{path} is not a whole parquet file: {_first_line(error)}") from error
        except OSError as error:
            raise CorpusError(f"{self.key}: cannot read {path}: {error.strerror or error}") from error

    def _parquet(self, path: Path) -> Iterator[tuple[str | None, int]]:
        with self._parquet_file(path) as file:
            self._check_column(str(path), file.schema_arrow.names)
            size = path.stat().st_size // max(1, file.metadata.num_rows)
            number = 0
            for batch in file.iter_batches(batch_size=ROWS, columns=[self.source.column]):
                for content in _as_bytes(batch.column(0), f"{path}, column {self.source.column}"):
                    number += 1
                    try:
                        yield None if content is None else _decoded(content), size
                    except _UnreadableError as problem:
                        self._unreadable(f"{path}, row {number}", problem)

    def _rows_of_parquet(self, path: Path) -> Iterator[tuple[str, Row, int]]:
        with self._parquet_file(path) as file:
            size = path.stat().st_size // max(1, file.metadata.num_rows)
            number = 0
            for batch in file.iter_batches(batch_size=ROWS):
                for offset in range(batch.num_rows):
                    number += 1
                    place = f"{path}, row {number}"
                    try:
                        (row,) = batch.slice(offset, 1).to_pylist()
                    except UnicodeDecodeError as error:
                        self._unreadable(place, _bad_byte(error))
                        continue
                    except (ValueError, OverflowError) as error:  # such as a date after the year 9999
                        self._unreadable(place, _first_line(error))
                        continue
                    yield place, row, size

    def _rows_of_dataset(self, column: str | None) -> Iterator[tuple[str, Row, int]]:
        """Rows of a Hugging Face dataset, with all columns or only one; their size in characters."""
        source = self.source
        place = " ".join(part for part in (f"dataset {source.dataset}", source.subset, f"split {source.split}") if part)
        with _hub_errors(f"{self.key}: {place}"):
            import datasets

            rows = datasets.load_dataset(
                source.dataset, source.subset, split=source.split, revision=source.revision, streaming=source.streaming
            )
            if column is not None and rows.column_names is not None:
                self._check_column(place, rows.column_names)
                rows = rows.select_columns([column])
            batches = iter(rows.iter(batch_size=ROWS))
        number = 0
        while True:
            with _hub_errors(f"{self.key}: {place}"):
                batch = next(batches, None)
            if batch is None:
                return
            if column is not None:
                self._check_column(place, list(batch))
            for values in zip(*batch.values(), strict=True):
                number += 1
                size = sum(len(value) for value in values if isinstance(value, str))
                yield f"{place}, row {number}", dict(zip(batch, values, strict=True)), size

    def _text_of_row(self, row: Row) -> str | None:
        column = self.source.column
        if column not in row:
            raise _UnreadableError(f"no column {column!r}; it has {', '.join(row) or 'none'}")
        return _checked(row[column])

    def _check_column(self, place: str, columns: list[str]) -> None:
        if self.source.column not in columns:
            raise CorpusError(
                f"{place} has no column {self.source.column!r}; it has {', '.join(columns)}: {self.called.column}"
            )


def _files(pattern: str, named: str = "the path of a source in data.sources") -> list[Path]:
    """The files that a path, folder or glob names, sorted.

    Raises:
        CorpusError: there is none, or one of a kind that cannot be read.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        visible = [file for file in path.rglob("*") if not _is_hidden(file.relative_to(path)) and file.is_file()]
        files = [file for file in visible if _format(file) is not None]  # a README beside the data is no data
        if not files:
            raise CorpusError(f"the folder {path} holds no file that can be read: {SUFFIXES}")
        return sorted(files)
    files = [path] if path.is_file() else _glob(path)
    if not files:
        raise CorpusError(f"there is no file {path} ({named})")
    for file in files:
        if _format(file) is None:
            raise CorpusError(f"{file} is not of a kind that can be read: {SUFFIXES}")
    return sorted(files)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _glob(pattern: Path) -> list[Path]:
    """The files that match a pattern with * ? [] or **."""
    parts = (*pattern.parts, "*") if pattern.name == "**" else pattern.parts
    plain = next((place for place, part in enumerate(parts) if any(sign in part for sign in "*?[")), len(parts) - 1)
    try:
        return [file for file in set(Path(*parts[:plain]).glob(str(Path(*parts[plain:])))) if file.is_file()]
    except ValueError as error:
        raise CorpusError(f"{pattern} is no pattern of files: {error}") from error


def _common_folder(files: list[Path]) -> Path:
    return next(folder for folder in files[0].parents if all(folder in file.parents for file in files))


def _format(path: Path) -> str | None:
    """Which of FORMATS a file has, by its name."""
    if path.suffix in PACKINGS and path.with_suffix("").suffix in (".jsonl", ".txt"):
        return path.with_suffix("").suffix
    return path.suffix if path.suffix in FORMATS else None


@contextmanager
def _unpacked(raw: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    """The content of a file that may be packed.

    Raises:
        CorpusError: the packed file is damaged or cut short, noticed while reading.
    """
    if path.suffix == ".gz":
        with gzip.GzipFile(fileobj=raw) as unpacked:
            try:
                yield io.BufferedReader(unpacked, CHUNK_BYTES)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise CorpusError(f"{path} is damaged or cut short: {error}. Fetch it again") from error
    elif path.suffix == ".zst":
        yield io.BufferedReader(_ZstdContent(raw, path), CHUNK_BYTES)
    else:
        yield raw


class _ZstdContent(io.RawIOBase):
    """Content of a .zst file of one or more frames. The library's own reader takes a cut file for a whole one."""

    def __init__(self, raw: IO[bytes], path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise CorpusError(f"{path}: to read .zst, install it: pip install '.[zstd]'") from error
        self._library = zstandard
        self._raw = raw
        self._path = path
        self._frame: Any = None
        self._packed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            self._packed = self._packed or self._raw.read(CHUNK_BYTES // 8)
            if not self._packed:
                if self._frame is not None:
                    raise CorpusError(f"{self._path} is cut short: its last frame has no end. Fetch it again")
                return 0
            self._unpack()
        size = min(len(buffer), len(self._content))
        buffer[:size] = self._content[:size]
        self._content = self._content[size:]
        return size

    def _unpack(self) -> None:
        """Unpacks what has been read, up to the end of the frame that it belongs to."""
        if self._frame is None:
            longest = self._library.ZstdDecompressor(max_window_size=1 << 31)  # files packed with zstd --long=31
            self._frame = longest.decompressobj()
        try:
            self._content = memoryview(self._frame.decompress(self._packed))
        except self._library.ZstdError as error:
            raise CorpusError(f"{self._path} is damaged: {error}. Fetch it again") from error
        self._packed = b""
        if self._frame.eof:
            self._packed = self._frame.unused_data
            self._frame = None


def _lines(content: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, without a byte order mark."""
    prefix = BYTE_ORDER_MARK
    while line := content.readline(LONGEST + 1):
        if len(line) > LONGEST:
            raise _TooLongError("line")
        yield line.removeprefix(prefix)
        prefix = b""


def _split(content: IO[bytes], separator: str | None) -> Iterator[bytes]:
    """The parts of a file between separators; the last may be empty. Works on bytes: UTF-8 is never cut wrongly."""
    if not separator:
        document = content.read(LONGEST + 1)
        if len(document) > LONGEST:
            raise _TooLongError("document")
        yield document.removeprefix(BYTE_ORDER_MARK)
        return
    rest = content.read(CHUNK_BYTES).removeprefix(BYTE_ORDER_MARK)
    while chunk := content.read(max(CHUNK_BYTES, len(rest))):  # more each time, lest a long document be copied often
        *documents, rest = (rest + chunk).split(separator.encode())
        if len(rest) > LONGEST:
            raise _TooLongError("document")
        yield from documents
    yield from rest.split(separator.encode())


def _row_of_line(line: bytes) -> Row:
    try:
        row = json.loads(_decoded(line))
    except json.JSONDecodeError as error:
        raise _UnreadableError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise _UnreadableError("not JSON: nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise _UnreadableError(f"not JSON: {_first_line(error)}") from error
    if not isinstance(row, dict):
        raise _UnreadableError("not a JSON object")
    return row


def _checked(value: Any) -> str | None:
    """A value that must be a text or null."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise _UnreadableError(f"the text is a {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _UnreadableError("half of a surrogate pair, which no UTF-8 text can hold") from error
    return value


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise _UnreadableError(_bad_byte(error)) from error


def _bad_byte(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x})"


def _as_bytes(column: Any, place: str) -> Iterable[bytes | None]:
    """The values of a pyarrow column of strings as bytes, so that bad UTF-8 is met value by value."""
    import pyarrow

    kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise CorpusError(f"{place} holds {column.type}, not strings")
    return (value.as_py() for value in column.cast(kind).cast(pyarrow.large_binary()))


@contextmanager
def _hub_errors(place: str) -> Iterator[None]:
    """Turns what the datasets library raises, for a wrong name as for a lost network, into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise CorpusError(f"{place} cannot be read: {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]
