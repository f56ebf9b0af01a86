"""The Catalan texts of this package, in cucafera/corpora."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cucafera.config.fields import setting
from cucafera.config.registry import SOURCES, Judge
from cucafera.config.schema import SourceConfig
from cucafera.data.sources import ReadContext, Source, SourceKind, SourceRow, fingerprint_of
from cucafera.data.sources.files import FilesConfig, FilesSource

CORPORA = Path(__file__).parents[2] / "corpora"

CONTENTS = {"catalan": "documents", "conversations": "conversations", "preferences": "pairs of answers"}
"""The rows of each text of this package, in the plural."""


@dataclass
class EmbeddedConfig(SourceConfig):
    """Texts of this package."""

    embedded: str | None = setting(
        None, "Texts that come with the package: catalan (documents), conversations or preferences (pairs of answers)."
    )


class EmbeddedSource(Source[EmbeddedConfig]):
    """Rows of a file of this package. The title of a document is the first line of its text."""

    def __init__(self, config: EmbeddedConfig, context: ReadContext) -> None:
        super().__init__(config, context)
        self._path = embedded_path(str(config.embedded))

    def size_bytes(self) -> int:
        """Return the bytes of the file."""
        return self._path.stat().st_size

    def fingerprint(self) -> str:
        """Return a hash of the content: each installation gives the file another time of change."""
        return fingerprint_of(self.config, hashlib.sha256(self._path.read_bytes()).hexdigest())

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[SourceRow]:
        """Yield each row."""
        for row, size, position in FilesSource(FilesConfig(path=str(self._path)), self.context).rows():
            if "title" in row:
                row["text"] = f"{row['title']}\n\n{row['text']}"
            yield row, size, position


@SOURCES.register
class Embedded(SourceKind):
    """Selected by `embedded`."""

    name = "embedded"
    config = EmbeddedConfig
    source = EmbeddedSource

    def problems(self, key: str, config: EmbeddedConfig, judge: Judge) -> Iterator[str]:
        """Yield a sentence if the package has no such texts."""
        if judge(f"{key}.embedded") and config.embedded not in CONTENTS:
            yield f"{key}.embedded is {config.embedded}; it must be one of {', '.join(CONTENTS)}"


def embedded_path(name: str) -> Path:
    """Return the path of texts of this package.

    Rows of `catalan` have title, genre and text; of `conversations` topic and messages; of `preferences` topic, kind,
    prompt, chosen and rejected, where the last three are lists of messages and `kind` says what is worse.
    """
    return CORPORA / f"{name}.jsonl"
