"""Files on this machine: tables, JSON and text, also compressed."""

import functools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from cucafera.config.errors import one_line
from cucafera.config.fields import setting
from cucafera.config.registry import SOURCES, Judge
from cucafera.config.schema import SourceConfig
from cucafera.data.compression import COMPRESSED, decompressed
from cucafera.data.sources import CorpusError, Source, SourceKind, SourceRow, fingerprint_of
from cucafera.data.sources._paths import FoundFiles, find_files
from cucafera.data.sources._rows import (
    DELIMITERS,
    PlacedRow,
    rows_of_csv,
    rows_of_json,
    rows_of_json_lines,
    rows_of_parquet,
    rows_of_text,
)

VERSION = 1
"""Increased whenever the same files would give other rows."""
TABLES = "rows of columns, as in .jsonl, .json, .csv or .parquet"
COMPRESSIBLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
READABLE = ".jsonl, .txt, .json, .ndjson, .csv and .tsv (also compressed as .gz, .zst, .bz2 or .xz) and .parquet"

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MISNAMED = {
    b"\xff\xfe\0\0": "UTF-32, not UTF-8: convert it, for example with iconv -f UTF-32 -t UTF-8",
    b"\xff\xfe": "UTF-16, not UTF-8: convert it, for example with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16, not UTF-8: convert it, for example with iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "compressed by gzip: let its name end with .gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: let its name end with .zst",
    b"PK\x03\x04": "a zip archive, as those of office programs are: extract it, save a sheet as .csv, a text as .txt",
    b"BZh91AY&SY": "compressed by bzip2: let its name end with .bz2",
    b"\xfd7zXZ\0": "compressed by xz: let its name end with .xz",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: extract it",
    b"PAR1": "a parquet file: let its name end with .parquet",
    b"ARROW1": "an Arrow file: convert it, for example with pyarrow.parquet.write_table",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "a file of an office program: save a sheet as .csv, a text as .txt",
    b"SQLite format 3\0": "a database of SQLite: export a table as .csv",
    b"%PDF-": "a PDF: extract its text",
    b"version https://git-lfs.github.com/": "a pointer of Git LFS, not the file: get it with `git lfs pull`",
}
"""First bytes of what is no text, and what that is."""
LONGEST_BEGINNING = max(map(len, MISNAMED))
HTML = re.compile(rb"\s*<(!doctype html|html|\?xml)\b", re.IGNORECASE)
HELD_OUT_NAMES = {"test", "valid", "validation", "val", "dev", "eval"}
"""Words in the names of files that other people hold out."""
ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


@dataclass
class FilesConfig(SourceConfig):
    """Files on this machine."""

    path: str | list[str] | None = setting(
        None, f"A file, folder or glob, or a list of them: '[a.jsonl,b/]'. Formats: {READABLE}."
    )
    document_separator: str | None = setting(
        None, r"Text between documents of a .txt file, with \n, \r, \t and \\ as escapes; null: a file is one document."
    )


class FilesSource(Source[FilesConfig]):
    """Rows of files, in the order of their paths. Sizes are bytes of the files as they are on the disk."""

    @functools.cached_property
    def _found(self) -> FoundFiles:
        path = self.config.path
        assert path is not None
        return find_files([path] if isinstance(path, str) else path, self.name, _format, READABLE)

    @functools.cached_property
    def _statuses(self) -> dict[Path, tuple[int, int]]:
        """Size and time of change of each file when it was first looked at."""
        return {file: self._status(file) for file in self._found.files}

    def _status(self, file: Path) -> tuple[int, int]:
        try:
            status = file.stat()
        except OSError as error:
            raise self._cannot_read(file, error) from error
        return status.st_size, status.st_mtime_ns

    @functools.cached_property
    def _separator(self) -> str | None:
        separator = self.config.document_separator
        if not separator:
            return None
        unescaped = re.sub(r"\\([nrt\\])", lambda found: ESCAPES[found[1]], separator)
        return unescaped.replace("\r\n", "\n").replace("\r", "\n")

    def size_bytes(self) -> int:
        """Return the bytes of all files."""
        return sum(size for size, _ in self._statuses.values())

    def fingerprint(self) -> str:
        """Return a hash of the files' relative names, sizes and times of change, and of how they are read."""
        absolute = {Path(os.path.abspath(file)): status for file, status in self._statuses.items()}  # noqa: PTH100  # resolve() would follow symlinks
        folder = Path(os.path.commonpath([file.parent for file in absolute]))
        files = [(file.relative_to(folder).as_posix(), *status) for file, status in absolute.items()]
        return fingerprint_of(self.config, "files", VERSION, files, self._separator)

    def check(self) -> None:
        """Raise CorpusError if there is no file to read."""
        self._found  # noqa: B018  # finds them

    def inputs(self) -> set[str]:
        """Return the files, without symlinks."""
        return {os.path.realpath(file) for file in self._found.files}

    def notes(self) -> Iterator[str]:
        """Yield what is left out of the folders, and a separator without effect."""
        if left_out := self._found.describe():
            yield left_out
        if self._separator and not any(_format(file) == ".txt" for file in self._found.files):
            yield "document_separator has no effect: there is no .txt file"
        words = {word for file in self._found.files for word in _words(file)}
        if "train" in words and (others := HELD_OUT_NAMES & words):
            yield (
                f"files named train and {', '.join(sorted(others))} are all training data, of which "
                "data.validation_fraction is held out: to leave some out, name those to read in path"
            )

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[SourceRow]:
        """Yield each row. One of a .txt file has only the text column, so it is refused where all are needed."""
        without_rows, undivided, divided = [], [], 0
        for path, status in self._statuses.items():
            if columns is None and _format(path) == ".txt":
                raise CorpusError(f"{self.name}: {path} is a .txt file, which has no columns: give {TABLES}")
            broken, number = self.counts.broken, 0
            for number, row in enumerate(self._rows_of(path, columns), 1):  # noqa: B007
                yield row
            if self._status(path) != status:
                raise CorpusError(f"{self.name}: {path} changed while it was read: start again when it is complete")
            if not number and self.counts.broken == broken:
                without_rows.append(path)
            elif self._separator and _format(path) == ".txt":
                divided += number > 1
                undivided += [path] if number == 1 else []
        if without_rows:
            self.counts.notes.append(
                one_line(f"{len(without_rows):,} of its files hold no row, such as {without_rows[0]}")
            )
        if undivided:
            total = len(undivided) + divided
            self.counts.notes.append(
                f"no document_separator in {len(undivided):,} of {total:,} .txt files, each of which is one document, "
                f"such as {one_line(str(undivided[0]))}"
            )

    def _rows_of(self, path: Path, columns: Sequence[str] | None) -> Iterator[SourceRow]:
        try:
            if _format(path) == ".parquet":
                with path.open("rb") as raw:
                    self._check_beginning(raw, path)
                yield from rows_of_parquet(path, columns, self.context)
                return
            with path.open("rb") as raw, decompressed(raw, path) as content:
                head = self._check_beginning(content, path)
                if b"\0" in head[:4]:
                    raise CorpusError(f"{self.name}: {path} begins with NUL bytes: it is no text, or not in UTF-8")
                if head.startswith(BYTE_ORDER_MARK):
                    content.read(len(BYTE_ORDER_MARK))
                read = 0
                for row, position in self._rows_of_content(content, path, columns):
                    yield row, raw.tell() - read, position
                    read = raw.tell()
        except OSError as error:
            raise self._cannot_read(path, error) from error

    def _check_beginning(self, content: BufferedReader, path: Path) -> bytes:
        """Return the first bytes of a file. Raises CorpusError if they are those of another format."""
        head = content.peek(LONGEST_BEGINNING)[:LONGEST_BEGINNING]
        for beginning, what in MISNAMED.items():
            if head.startswith(beginning) and not (beginning == b"PAR1" and _format(path) == ".parquet"):
                raise CorpusError(f"{self.name}: {path} is {what}")
        if _format(path) != ".txt" and HTML.match(head):
            raise CorpusError(f"{self.name}: {path} is a web page or XML, perhaps the error page of a download")
        return head

    def _rows_of_content(
        self, content: BufferedReader, path: Path, columns: Sequence[str] | None
    ) -> Iterator[PlacedRow]:
        match _format(path):
            case ".json":
                return rows_of_json(content, path, columns, self.context)
            case ".csv" | ".tsv" as kind:
                return rows_of_csv(content, path, DELIMITERS[kind], columns, self.context)
            case ".txt":
                return rows_of_text(content, path, self.config.columns.text, self._separator, self.context)
        return rows_of_json_lines(content, path, self.context)

    def _cannot_read(self, path: Path, error: OSError) -> CorpusError:
        return CorpusError(f"{self.name}: cannot read {path}: {error.strerror or error}")


def _words(file: Path) -> list[str]:
    return re.split(r"[^a-z]+", f"{file.parent.name}/{file.stem}".lower())


@SOURCES.register
class Files(SourceKind):
    """Selected by `path`."""

    name = "path"
    config = FilesConfig
    source = FilesSource

    def problems(self, key: str, config: FilesConfig, judge: Judge) -> Iterator[str]:
        """Yield a sentence for an empty path or separator."""
        if judge(f"{key}.path") and isinstance(config.path, list) and not all(config.path):
            yield f"{key}.path has an empty item; each must be a file, folder or glob"
        if judge(f"{key}.document_separator") and config.document_separator == "":
            yield f"{key}.document_separator is empty; give a text, or null: a file is one document"


def _format(path: Path) -> str | None:
    """Return the suffix by which a file is read, in small letters and without that of a compression; or None."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSED:
        suffix = path.with_suffix("").suffix.lower()
        return suffix if suffix in COMPRESSIBLE else None
    return suffix if suffix in (*COMPRESSIBLE, ".parquet") else None
