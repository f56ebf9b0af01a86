"""Sources: one module per kind of source, registered by the key that selects it.

A source yields rows, whatever it reads: a document is a row and its text column, a conversation is a row and its
conversation columns. To add a kind, write a module with a `SourceKind` and decorate it with `@SOURCES.register`.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from cucafera.config.errors import UserError, one_line
from cucafera.config.registry import SOURCES, Judge
from cucafera.config.schema import SourceConfig

Row = dict[str, Any]
"""Values by column."""
SourceRow = tuple[Row, int, str]
"""A row, the bytes of input read since the row before, and its position for messages, such as FILE:LINE."""
C = TypeVar("C", bound=SourceConfig)
T = TypeVar("T")
COLUMNS_OF_PAIRS = ("chosen", "rejected")
"""Settings of columns that are part of a fingerprint only if they name one."""


class CorpusError(UserError):
    """A source that does not exist or cannot be read, as one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


@dataclass
class ReadCounts:
    """Counts of one pass over a source."""

    documents: int = 0
    """Documents or conversations that were read."""
    empty: int = 0
    """Documents left out because they are null, empty or only whitespace."""
    broken: int = 0
    """Rows left out because they cannot be read."""
    first_broken: str = ""
    """Position of the first of those, and what is wrong with it."""
    notes: list[str] = field(default_factory=list)
    """Facts about the source that are known when it has been read, as clauses without its name."""


@dataclass
class ReadContext:
    """Name and advice for the errors of a source, and the handling of rows that cannot be read."""

    name: str
    """The configuration key or command-line option of the source."""
    column_advice: str
    """Advice for a missing column."""
    broken_advice: str
    """Advice for a row that cannot be read."""
    skip_broken_rows: bool = False
    """Leave such rows out and count them, instead of stopping at the first."""
    counts: ReadCounts = field(default_factory=ReadCounts)

    def broken(self, position: str, problem: object, rows: int = 1) -> None:
        """Count a row, or several, that cannot be read. Raises CorpusError if such rows are not skipped."""
        if not self.skip_broken_rows:
            raise CorpusError(f"{position}: {problem}. {self.broken_advice}")
        if not self.counts.broken:
            self.counts.first_broken = one_line(f"{position}: {problem}")
        self.counts.broken += rows

    def check_columns(self, position: str, wanted: Sequence[str] | None, found: Sequence[str]) -> None:
        """Raise CorpusError if a wanted column is not among those found."""
        for column in wanted or ():
            if column not in found:
                names = ", ".join(found) or "none"
                raise CorpusError(f"{position} has no column {column!r}; it has {names}: {self.column_advice}")


class Source(ABC, Generic[C]):
    """The rows of one source. Opening it reads nothing.

    Args:
        config: Where they are.
        context: How errors name the source, and the counts of what is read.
    """

    def __init__(self, config: C, context: ReadContext) -> None:
        self.config = config
        self.context = context
        self.name = context.name
        self.counts = context.counts

    @abstractmethod
    def rows(self, columns: Sequence[str] | None = None) -> Iterator[SourceRow]:
        """Yield each row.

        Args:
            columns: The others need not be read; None: all of them are needed.

        Raises:
            CorpusError: The source does not exist, has no such column, or holds something that cannot be read.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash that changes when the documents or conversations may have changed; see `fingerprint_of`.

        Raises:
            CorpusError: The source does not exist.
        """

    @property
    def is_streamed(self) -> bool:
        """True if each pass reads the rows over the network."""
        return False

    def check(self) -> None:
        """Find out that the source exists, as far as that is possible without reading or downloading anything.

        Raises:
            CorpusError: It does not.
        """

    def inputs(self) -> set[str]:
        """Return names of what is read, such as paths, by which an overlap of two sources is found."""
        return set()

    def notes(self) -> Iterator[str]:
        """Yield facts that are known before reading and are no errors, such as files left out, as clauses.

        Raises:
            CorpusError: As `fingerprint`.
        """
        yield from ()

    def size_bytes(self) -> int | None:
        """Return the bytes of input in all, for progress; None if unknown. Raises CorpusError as `fingerprint`."""
        return None

    def documents(self) -> Iterator[tuple[str, int]]:
        """Yield the text of each document, and the bytes of input since the one before.

        Raises:
            CorpusError: As `rows`.
        """
        column = self.config.columns.text
        input_bytes = 0
        for text, size in self._convert(lambda row: _text(row, column), [column]):
            input_bytes += size
            if text is None or not text.strip():
                self.counts.empty += 1
                continue
            self.counts.documents += 1
            yield text, input_bytes
            input_bytes = 0

    def convert(self, function: Callable[[Row], T]) -> Iterator[tuple[T, int]]:
        """Yield the result of a function for each row, and the bytes of input since the one before.

        A row for which it raises UserError is treated like one that cannot be read.

        Raises:
            CorpusError: As `rows`.
        """
        for converted in self._convert(function, None):
            self.counts.documents += 1
            yield converted

    def _convert(self, function: Callable[[Row], T], columns: Sequence[str] | None) -> Iterator[tuple[T, int]]:
        input_bytes = 0
        for row, size, position in self.rows(columns):
            input_bytes += size
            try:
                converted = function(row)
            except UserError as problem:
                self.context.broken(position, problem)
                continue
            yield converted, input_bytes
            input_bytes = 0


class SourceKind:
    """One kind of source.

    Attributes:
        name: The key of `config` that selects the kind by having a value.
        config: Dataclass of its settings.
        source: Reads it.
    """

    name: str
    config: type[SourceConfig]
    source: type[Source[Any]]

    def problems(self, key: str, config: Any, judge: Judge) -> Iterator[str]:
        """Yield a sentence for each combination of values that the kind cannot work with; `key` is the source's."""
        yield from ()

    def open(self, config: Any, context: ReadContext) -> Source[Any]:
        """Return the source, without reading it."""
        return self.source(config, context)


def open_source(name: str, config: SourceConfig, skip_broken_rows: bool = False) -> Source[Any]:
    """Return the source of a configuration, without reading it.

    Args:
        name: Its name in data.sources.
        config: Its settings; their class decides the kind.
        skip_broken_rows: Leave out and count rows that cannot be read.
    """
    key = f"data.sources.{name}"
    advice = "Fix it, or set data.skip_broken_lines=true to leave it out"
    context = ReadContext(key, f"set {key}.columns.text", advice, skip_broken_rows)
    kinds: list[SourceKind] = [SOURCES.get(kind) for kind in SOURCES.names()]
    return next(kind for kind in kinds if kind.config is type(config)).open(config, context)


def source_notes(sources: Mapping[str, SourceConfig]) -> Iterator[str]:
    """Yield the notes of all sources of a run, and which of them read the same, as one line each.

    Raises:
        CorpusError: A source does not exist.
    """
    opened = [open_source(name, config) for name, config in sources.items()]
    for number, source in enumerate(opened):
        yield from (one_line(f"{source.name}: {note}") for note in source.notes())
        for other in opened[:number]:
            if common := source.inputs() & other.inputs():
                more = f" and {len(common) - 1:,} more" if len(common) > 1 else ""
                yield one_line(f"{source.name}: reads the same as {other.name}: {min(common)}{more}")


def fingerprint_of(config: SourceConfig, *parts: object) -> str:
    """Return a hash of the columns of a source and of what else decides its rows, as JSON values."""
    named = {
        setting: column
        for setting, column in asdict(config.columns).items()
        if column is not None or setting not in COLUMNS_OF_PAIRS  # documents prepared before there were pairs
    }
    return hashlib.sha256(json.dumps([named, *parts]).encode()).hexdigest()


def is_held_out(text: str, fraction: float) -> bool:
    """True if a document belongs to the held-out fraction.

    The hash of the text alone decides: a document stays on its side whatever is added to the corpus, and copies of
    it are all on the same side.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or ["no reason given"])[0]


def bad_byte(error: UnicodeDecodeError) -> str:
    """Return a sentence about bytes that are not UTF-8."""
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x})"


def _text(row: Row, column: str) -> str | None:
    """Return the text of a row, or None if it is null. Raises UserError if it is no text that UTF-8 can hold."""
    if column not in row:
        raise UserError(f"no column {column!r}; it has {', '.join(row) or 'none'}")
    value = row[column]
    if value is None:
        return None
    if isinstance(value, bytes):  # a column of parquet that its writer has not marked as text
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise UserError(bad_byte(error)) from error
    if not isinstance(value, str):
        raise UserError(f"the text is a {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError("half of a surrogate pair, which UTF-8 cannot encode") from error
    return value
