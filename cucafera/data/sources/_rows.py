"""From the content of a file to rows: one function per format. Each yields rows with their positions for messages."""

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any

from cucafera.config.errors import UserError
from cucafera.data.sources import CorpusError, ReadContext, Row, SourceRow, bad_byte, first_line
from cucafera.quantities import number_of

PlacedRow = tuple[Row, str]
"""A row, and its position."""

CHUNK_BYTES = 1 << 20
MAX_TEXT_BYTES = 1 << 30
"""Of a line, of an object of an array, or of a document in a .txt file: a file of a few megabytes may decompress to any
size."""
BATCH_ROWS = 256
"""Rows of a parquet file in memory at a time."""
CUT_CHARACTERS = 12
"""JSON that is cut anywhere has its error at most this far from its end, or an unterminated string."""
WHITESPACE = re.compile(r"[ \t\r\n]*")
EXCEL_DELIMITER = re.compile(r'"?sep=(.)"?\s*')
"""The first line by which spreadsheets choose the delimiter."""
QUOTED = re.compile(r'"(?:[^"]|"")*"')
DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}
"""Characters that may separate the columns of a format."""
NO_ROWS = "give an array of objects, or one object per line"


def rows_of_json_lines(content: BufferedReader, path: Path, context: ReadContext) -> Iterator[PlacedRow]:
    """Yield the objects of JSON lines."""
    return _objects(_lines(content, path), 1, path, context)


def _objects(lines: Iterable[bytes], first: int, path: Path, context: ReadContext) -> Iterator[PlacedRow]:
    for number, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        position = f"{path}:{number}"
        try:
            row = _parse_line(line)
        except UserError as problem:
            is_array = number == 1 and line.startswith(b"[")
            context.broken(position, f"{problem} (an array is read from a .json file)" if is_array else problem)
            continue
        yield row, position


def rows_of_json(
    content: BufferedReader, path: Path, columns: Sequence[str] | None, context: ReadContext
) -> Iterator[PlacedRow]:
    """Yield the objects of one array, or of JSON lines.

    Args:
        content, path, context: See `rows_of_json_lines`.
        columns: Those that are needed; None: all.

    Raises:
        CorpusError: It is neither.
    """
    number = 1
    while (head := content.peek(1)[:1]).isspace():
        number += content.read(1) == b"\n"
    if head == b"[":
        yield from _rows_of_array(content, path, number, context)
        return
    lines = _lines(content, path)
    line = next(lines, b"")
    if _continues(line):
        raise CorpusError(f"{path}:{number}: an object of several lines; {NO_ROWS}")
    rows = _objects(chain([line], lines), number, path, context)
    first, second = next(rows, None), next(rows, None)
    if first is None or second is not None:
        yield from (row for row in (first, second) if row is not None)
        yield from rows
        return
    broken = context.counts.broken
    for name, value in first[0].items():
        if columns and isinstance(value, list) and (name in columns or not set(columns) & set(first[0])):
            raise CorpusError(f"{path} holds one object, whose {name!r} is a list; {NO_ROWS}")
    yield first[0], f"{first[1]} (the only object of the file)"
    if context.counts.broken > broken:  # an object of all rows, or of all columns
        raise CorpusError(f"{path} holds one object, which is no row; {NO_ROWS}")


def _continues(line: bytes) -> bool:
    """True if a line is the beginning of a JSON value that continues on the next line."""
    text = line.decode(errors="replace").rstrip()
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return text.startswith("{") and error.pos >= len(text)
    except (RecursionError, ValueError):
        pass
    return False


def _rows_of_array(content: BufferedReader, path: Path, line: int, context: ReadContext) -> Iterator[PlacedRow]:
    """Yield the objects of one JSON array, of which only the part that is being read is in memory.

    Raises:
        CorpusError: It is not JSON. After an error, no one can say where the next object begins.
    """
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    decoder = json.JSONDecoder()
    text, at = "", 0

    def read_more() -> bool:
        """Append a chunk to what is left of the text, at least as long; False at the end of the file."""
        nonlocal text, at
        text, at = text[at:], 0
        if len(text) > MAX_TEXT_BYTES:
            raise _too_long(path, "object")
        chunk = content.read(max(CHUNK_BYTES, len(text)))
        text += decode(chunk, final=not chunk)
        return bool(chunk)

    def skip_whitespace() -> str:
        """Return the next character that is no whitespace; empty at the end of the file."""
        nonlocal at, line
        while True:
            end = WHITESPACE.match(text, at).end()  # type: ignore[union-attr]
            line += text.count("\n", at, end)
            at = end
            if at < len(text) or not read_more():
                return text[at : at + 1]

    def damaged(problem: object) -> CorpusError:
        return CorpusError(f"{path}:{line}: not JSON: {problem}. What follows in the array cannot be read")

    skip_whitespace()
    at += 1  # the bracket
    is_first = True
    while (character := skip_whitespace()) != "]":
        if not is_first:
            if character != ",":
                raise damaged("a comma or ] is missing" if character else "the array has no end; the file is truncated")
            at += 1
            skip_whitespace()
        while True:
            try:
                value, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                ends = error.msg.startswith("Unterminated string") or error.pos == len(text)
                if (ends or error.pos >= len(text) - CUT_CHARACTERS) and read_more():
                    continue
                raise damaged("the file is truncated" if ends else error.msg) from error
            except (RecursionError, ValueError) as error:
                raise damaged(first_line(error)) from error
            if end < len(text) or not read_more():
                break
        written = text[at:end]
        position = f"{path}:{line}"
        line, at, is_first = line + written.count("\n"), end, False
        try:
            written.encode()
        except UnicodeEncodeError as error:
            context.broken(position, f"not UTF-8 (byte 0x{ord(written[error.start]) - 0xDC00:02x})")
            continue
        if isinstance(value, dict):
            yield value, position
        else:
            context.broken(position, "not a JSON object")
    at += 1
    if skip_whitespace():
        raise damaged("text after the end of the array")


def rows_of_csv(
    content: BufferedReader, path: Path, delimiters: str, columns: Sequence[str] | None, context: ReadContext
) -> Iterator[PlacedRow]:
    """Yield the rows of a table whose first row names the columns; an empty field is null.

    Args:
        content, path, context: See `rows_of_json_lines`.
        delimiters: What may separate columns; the one that the first line has most often does, or the one of a line
            `sep=;` before it.
        columns: Those that are needed; None: all.

    Raises:
        CorpusError: The first row names no columns, or not those that are needed.
    """
    csv.field_size_limit(MAX_TEXT_BYTES)
    lines: Iterator[str] = (line.decode(errors="surrogateescape") for line in _lines(content, path))
    number, header = next(((number, line) for number, line in enumerate(lines, 1) if line.strip()), (0, ""))
    if not header:
        return
    if chosen := EXCEL_DELIMITER.fullmatch(header):
        delimiter, before = chosen[1], number
    else:
        delimiter, before = _delimiter(header, delimiters, path), number - 1
        lines = chain([header], lines)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] = []
    while True:
        read = reader.line_num
        position = f"{path}:{before + read + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            count = reader.line_num - read
            lost = f"; its quote makes one row of {number_of(count, 'line')}" if count > 1 else ""
            context.broken(position, f"not CSV: {error}{lost}", rows=count)
            continue
        if fields is None:
            return
        if not names:
            names = [name.strip() or f"(column {column})" for column, name in enumerate(fields, 1)]
            _check_names(f"{position}: the first row", names)
            context.check_columns(f"{position}: the first row", columns, names)
        elif not fields:
            continue  # an empty line
        elif len(fields) != len(names):
            context.broken(position, f"fields: {len(fields)}, in the first row: {len(names)}")
        elif problem := _undecoded(fields):
            context.broken(position, problem)
        else:
            yield {name: field or None for name, field in zip(names, fields, strict=True)}, position


def _check_names(position: str, names: Sequence[str]) -> None:
    """Raise CorpusError if a name is given to several columns."""
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise CorpusError(f"{position} names the column {repeated[0]!r} more than once")


def _delimiter(header: str, delimiters: str, path: Path) -> str:
    """Return the delimiter that a header has most often outside of quotes. Raises CorpusError if there are two."""
    unquoted = QUOTED.sub("", header)
    counts = Counter({character: unquoted.count(character) for character in delimiters})
    (first, most), *others = counts.most_common()
    if others and most and others[0][1] == most:
        raise CorpusError(f"{path}: the first row has {first!r} as often as {others[0][0]!r}: which separates columns?")
    return first


def _undecoded(fields: Sequence[str]) -> str | None:
    """Return what is wrong with fields of a line that was not UTF-8."""
    try:
        "".join(fields).encode()
    except UnicodeEncodeError as error:
        return f"not UTF-8 (byte 0x{ord(error.object[error.start]) - 0xDC00:02x})"
    return None


def rows_of_text(
    content: BufferedReader, path: Path, column: str, separator: str | None, context: ReadContext
) -> Iterator[PlacedRow]:
    """Yield the documents of a .txt file as rows of one column, with line ends of any system as newlines.

    Args:
        content, path, context: See `rows_of_json_lines`.
        column: Name of the column.
        separator: Text between documents; None: the file is one document.
    """
    line = 1
    for document in _split(content, (separator or "").encode(), path):
        position = f"{path}:{line}"
        try:
            text = document.decode()
        except UnicodeDecodeError as error:
            line_of_error = line + document.count(b"\n", 0, error.start)
            context.broken(f"{path}:{line_of_error}", bad_byte(error))
        else:
            if "\0" in text:
                context.broken(position, "a document with NUL characters, which no text has")
            else:
                yield {column: text}, position
        line += document.count(b"\n") + (separator or "").count("\n")


def _split(content: BufferedReader, separator: bytes, path: Path) -> Iterator[bytes]:
    """Yield the parts of a file between separators; none of an empty file.

    They are split as bytes, so that no character is cut.
    """
    if not separator:
        document = _read_newlines(content, MAX_TEXT_BYTES + 1)
        _check_length(document, "document", path)
        yield from [document] if document else []
        return
    rest = _read_newlines(content, CHUNK_BYTES)
    if not rest:
        return
    # Chunks grow with what is left over, or a document of n bytes would be copied n / CHUNK_BYTES times.
    while chunk := _read_newlines(content, max(CHUNK_BYTES, len(rest))):
        *documents, rest = (rest + chunk).split(separator)
        _check_length(rest, "document", path)
        yield from documents
    yield from rest.split(separator)


def _read_newlines(content: BufferedReader, size: int) -> bytes:
    """Read at most size + 1 bytes, with \\r\\n and \\r as \\n."""
    chunk: bytes = content.read(size)
    if chunk.endswith(b"\r") and content.peek(1)[:1] == b"\n":
        chunk += content.read(1)
    return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in chunk else chunk


def rows_of_parquet(path: Path, columns: Sequence[str] | None, context: ReadContext) -> Iterator[SourceRow]:
    """Yield the rows of a parquet file, with an equal share of its size for each.

    Raises:
        CorpusError: It is damaged, or has no such column.
        OSError: It cannot be read.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_names(f"{path}: its schema", file.schema_arrow.names)
            context.check_columns(str(path), columns, file.schema_arrow.names)
            size = path.stat().st_size // max(1, file.metadata.num_rows)
            number = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                for values in _values_of_batch(batch):
                    number += 1
                    if isinstance(values, str):
                        context.broken(f"{path}, row {number}", values)
                    else:
                        yield values, size, f"{path}, row {number}"
    except pyarrow.ArrowException as error:
        raise CorpusError(f"{path} is damaged or truncated: {first_line(error)}") from error


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


def _lines(content: BufferedReader, path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, which end with \\n, \\r\\n or \\r."""
    while line := content.readline(MAX_TEXT_BYTES + 1):
        _check_length(line, "line", path)
        if line.find(b"\r", 0, -2 if line.endswith(b"\r\n") else None) < 0:
            yield line
        else:
            yield from line.splitlines(keepends=True)


def _check_length(text: bytes, kind: str, path: Path) -> None:
    if len(text) > MAX_TEXT_BYTES:
        raise _too_long(path, kind)


def _too_long(path: Path, kind: str) -> CorpusError:
    return CorpusError(f"{path} holds a {kind} of over {MAX_TEXT_BYTES >> 20:,} MiB")


def _parse_line(line: bytes) -> Row:
    """Return the object of a JSON line. Raises UserError."""
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(bad_byte(error)) from error
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise UserError("not JSON: nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"not JSON: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError("not a JSON object")
    return values
