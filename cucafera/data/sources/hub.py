"""Datasets of the Hugging Face hub, and folders on this machine in their form."""

import functools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cucafera.config.errors import UserError
from cucafera.config.fields import setting
from cucafera.config.registry import SOURCES
from cucafera.config.schema import SourceConfig
from cucafera.data.sources import CorpusError, Source, SourceKind, SourceRow, fingerprint_of, first_line
from cucafera.data.sources._paths import content_of_folder, expanded
from cucafera.hub import WAIT_SECONDS, hub_problem

BATCH_ROWS = 256
"""Rows in memory at a time."""


@dataclass
class HubConfig(SourceConfig):
    """A dataset of the Hugging Face hub."""

    dataset: str | None = setting(
        None, "Name of a Hugging Face dataset: OWNER/NAME, or a folder in its form or of save_to_disk."
    )
    subset: str | None = setting(None, "Configuration of the Hugging Face dataset.")
    split: str = setting("train", "Split of the Hugging Face dataset.")
    revision: str | None = setting(
        None, "Commit, tag or branch of the Hugging Face dataset; null: the newest commit when a run starts."
    )
    streaming: bool = setting(False, "Read the Hugging Face dataset over the network instead of downloading it first.")


class HubSource(Source[HubConfig]):
    """Rows of a dataset. Sizes are the characters of the columns that hold text."""

    @property
    def _folder(self) -> Path | None:
        """The folder, if it is one on this machine; `datasets` too looks there first."""
        folder = expanded(str(self.config.dataset))
        return folder if folder.is_dir() else None

    @property
    def is_streamed(self) -> bool:
        """True if the dataset is not downloaded first."""
        return self.config.streaming and self._folder is None

    def fingerprint(self) -> str:
        """Return a hash of the name and commit of the dataset, or of the files of a folder."""
        config = self.config
        if self._folder is not None:
            content = content_of_folder(self._folder, self.name)
            return fingerprint_of(config, "dataset folder", content, config.subset, config.split)
        revision = _newest_commit(str(config.dataset), config.revision).commit or config.revision
        return fingerprint_of(config, "dataset", config.dataset, config.subset, config.split, revision)

    def check(self) -> None:
        """Raise CorpusError if the name can only be that of a folder, and there is none."""
        if self._folder is None and str(self.config.dataset).startswith((".", "/", "~")):
            raise CorpusError(f"{self.name}: there is no folder {self.config.dataset}")

    def inputs(self) -> set[str]:
        """Return the dataset with its subset and split."""
        config = self.config
        name = os.path.realpath(self._folder) if self._folder is not None else config.dataset
        return {" ".join(str(part) for part in (name, config.subset, config.split) if part)}

    def notes(self) -> Iterator[str]:
        """Yield that a change on the hub would not be noticed, if so."""
        if self._folder is None:
            commit, problem = _newest_commit(str(self.config.dataset), self.config.revision)
            if problem is not None:
                used = (
                    f"the downloaded commit {commit[:12]} is used" if commit else "its downloaded copy is used, if any"
                )
                yield f"{self.config.dataset}: {used}, and changes on the hub are not detected: {problem}"

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[SourceRow]:
        """Yield each row."""
        config = self.config
        parts = (f"dataset {config.dataset}", config.subset, f"split {config.split}")
        position = " ".join(part for part in parts if part)
        before = self.fingerprint() if self._folder is not None else None
        with _one_line_errors(f"{self.name}: {position}", None if self._folder is not None else hub_problem()):
            rows = self._load()
            if columns is not None and rows.column_names is not None:  # a stream may not know its columns
                self.context.check_columns(position, columns, rows.column_names)
                rows = rows.select_columns(list(columns))
            batches = iter(rows.iter(batch_size=BATCH_ROWS))
        number = 0
        while True:
            with _one_line_errors(f"{self.name}: {position}"):
                batch = next(batches, None)
            if batch is None:
                break
            self.context.check_columns(position, columns, list(batch))
            for values in zip(*batch.values(), strict=True):
                number += 1
                size = sum(len(value) for value in values if isinstance(value, str))
                yield dict(zip(batch, values, strict=True)), size, f"{position}, row {number}"
        if before is not None and self.fingerprint() != before:
            raise CorpusError(f"{self.name}: {config.dataset} changed while it was read: start again")

    def _load(self) -> Any:
        """Return the dataset, or a stream of it."""
        import datasets

        config, folder = self.config, self._folder
        if folder is not None and any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(str(folder))
            if config.subset or (
                isinstance(saved, datasets.Dataset) and config.split not in ("train", str(saved.split))
            ):
                raise CorpusError(f"{self.name}: {folder} was saved without subsets and splits: leave them out")
            return saved[config.split] if isinstance(saved, datasets.DatasetDict) else saved
        # The cache of the library takes a changed file with an unchanged date for the old one, and files that are here
        # need no copy of their content there.
        streaming = config.streaming or folder is not None
        return datasets.load_dataset(
            str(folder or config.dataset),
            config.subset,
            split=config.split,
            revision=config.revision,
            streaming=streaming,
        )


@SOURCES.register
class Hub(SourceKind):
    """Selected by `dataset`."""

    name = "dataset"
    config = HubConfig
    source = HubSource


@contextmanager
def _one_line_errors(position: str, problem: str | None = None) -> Iterator[None]:
    """Turn whatever the datasets library raises, for a wrong name or a lost network, into one line.

    Args:
        position: The beginning of the line.
        problem: Why the hub cannot be asked, if so: then there is no earlier download either.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        reason = reason if problem is None else f"there is no complete earlier download, and {problem}"
        raise CorpusError(f"{position} cannot be read: {reason}") from error


class _Commit(NamedTuple):
    """The commit of a dataset on the hub, None if unknown, and why it is not known to be the newest one, if so."""

    commit: str | None
    problem: str | None


@functools.cache
def _newest_commit(dataset: str, revision: str | None) -> _Commit:
    """Return the commit of a revision of a dataset: of the hub, or without a network of what was downloaded last.

    Once per process, so that everything that it prepares is made from the same.
    """
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return _Commit(revision, None)
    import huggingface_hub

    problem = hub_problem()
    if problem is None:
        try:
            info = huggingface_hub.HfApi().dataset_info(dataset, revision=revision, timeout=WAIT_SECONDS)
            return _Commit(info.sha, None)
        except Exception as error:  # whatever the libraries for the network raise
            problem = f"{type(error).__name__}: {first_line(error)}"
    folder = huggingface_hub.constants.HF_HUB_CACHE
    reference = Path(folder, f"datasets--{dataset.replace('/', '--')}", "refs", revision or "main")
    downloaded = reference.read_text(encoding="utf-8").strip() if reference.is_file() else None
    return _Commit(downloaded, problem)
