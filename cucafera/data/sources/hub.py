"""Datasets of the Hugging Face hub."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from cucafera.config.errors import UserError
from cucafera.config.fields import setting
from cucafera.config.registry import SOURCES
from cucafera.config.schema import SourceConfig
from cucafera.data.sources import CorpusError, Source, SourceKind, SourceRow, fingerprint_of, first_line

BATCH_ROWS = 256
"""Rows in memory at a time."""


@dataclass
class HubConfig(SourceConfig):
    """A dataset of the Hugging Face hub."""

    dataset: str | None = setting(None, "Name of a Hugging Face dataset: OWNER/NAME.")
    subset: str | None = setting(None, "Configuration of the Hugging Face dataset.")
    split: str = setting("train", "Split of the Hugging Face dataset.")
    revision: str | None = setting(
        None, "Commit or tag of the Hugging Face dataset; without one, new content on the hub is not noticed."
    )
    streaming: bool = setting(False, "Read the Hugging Face dataset over the network instead of downloading it first.")


class HubSource(Source[HubConfig]):
    """Rows of a dataset. Sizes are the characters of the columns that hold text."""

    def fingerprint(self) -> str:
        """Return a hash of the name and revision of the dataset."""
        config = self.config
        return fingerprint_of(config, "dataset", config.dataset, config.subset, config.split, config.revision)

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[SourceRow]:
        """Yield each row."""
        config = self.config
        parts = (f"dataset {config.dataset}", config.subset, f"split {config.split}")
        position = " ".join(part for part in parts if part)
        with _one_line_errors(f"{self.name}: {position}"):
            import datasets

            rows = datasets.load_dataset(
                config.dataset, config.subset, split=config.split, revision=config.revision, streaming=config.streaming
            )
            if columns is not None and rows.column_names is not None:  # a stream may not know its columns
                self.context.check_columns(position, columns, rows.column_names)
                rows = rows.select_columns(list(columns))
            batches = iter(rows.iter(batch_size=BATCH_ROWS))
        number = 0
        while True:
            with _one_line_errors(f"{self.name}: {position}"):
                batch = next(batches, None)
            if batch is None:
                return
            self.context.check_columns(position, columns, list(batch))
            for values in zip(*batch.values(), strict=True):
                number += 1
                size = sum(len(value) for value in values if isinstance(value, str))
                yield dict(zip(batch, values, strict=True)), size, f"{position}, row {number}"


@SOURCES.register
class Hub(SourceKind):
    """Selected by `dataset`."""

    name = "dataset"
    config = HubConfig
    source = HubSource


@contextmanager
def _one_line_errors(position: str) -> Iterator[None]:
    """Turn whatever the datasets library raises, for a wrong name or a lost network, into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise CorpusError(f"{position} cannot be read: {type(error).__name__}: {first_line(error)}") from error
