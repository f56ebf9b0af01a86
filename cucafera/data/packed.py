"""Pretraining data: windows of a token stream, cut wherever they are full.

T  sequence_length
"""

import hashlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cucafera.config import SourceConfig, UserError
from cucafera.data.corpus import ReadCounts, is_held_out, read_documents, source_fingerprint
from cucafera.data.files import file_sha256, write_sealed
from cucafera.data.prepared import SUMMARY, damaged, prepare_once
from cucafera.data.shards import MANIFEST, VERSION, TokenStream, prepare_source
from cucafera.data.tokenizer import DOCUMENT_START_ID, Tokenizer
from cucafera.data.windows import OpenedSource, Window, WindowDataModule, short_hash

log = logging.getLogger(__name__)


class StreamWindows:
    """Windows of T + 1 tokens of a stream, each beginning with the last token of the one before.

    Args:
        stream: The tokens.
        length: T.
    """

    def __init__(self, stream: TokenStream, length: int) -> None:
        self.stream = stream
        self.length = length

    def __len__(self) -> int:
        return max(0, (len(self.stream) - 1) // self.length)

    def window(self, number: int) -> Window:
        """Every next token is a target; documents are counted from their start tokens."""
        ids = self.stream.read(number * self.length, self.length + 1).astype(np.int32)
        return Window(ids[:-1], ids[1:], np.cumsum(ids[:-1] == DOCUMENT_START_ID, dtype=np.int32))


class PackedDataModule(WindowDataModule[StreamWindows]):
    """Corpus, tokenizer, shards and windows of a pretraining run."""

    stop_id = DOCUMENT_START_ID

    def prepare_source(self, name: str, source: SourceConfig) -> None:
        """Writes the shards of a source."""
        prepare_source(
            name,
            source,
            self.tokenizer,
            self._shard_folder(source),
            validation_fraction=self.config.data.validation_fraction,
            shard_tokens=self.config.data.shard_tokens,
            skip_broken_lines=self.config.data.skip_broken_lines,
            processes=self.config.data.processes,
        )

    def open_source(self, name: str, source: SourceConfig) -> OpenedSource[StreamWindows]:
        """Opens the shards of a source."""
        folder = self._shard_folder(source)
        length = self.config.sequence_length
        training, validation = (
            StreamWindows(
                TokenStream.open(folder / side, self.tokenizer.fingerprint, self.config.model.vocab_size), length
            )
            for side in ("train", "validation")
        )
        if not len(training):
            raise UserError(
                f"data.sources.{name} gives {len(training.stream):,} training tokens; one window needs {length + 1:,} "
                "(sequence_length + 1): give more text, or a smaller sequence_length"
            )
        manifest = (folder / "train" / MANIFEST).read_bytes()
        return OpenedSource(training, validation, hashlib.sha256(manifest).hexdigest())

    def nothing_held_out(self) -> str:
        """The message that there is no window to validate on."""
        return (
            f"the held-out documents give {_tokens_in(self.validation_sources):,} tokens; one window needs "
            f"{self.config.sequence_length + 1:,}: give more documents, or a larger data.validation_fraction (a .txt "
            "file is one document unless its source has a document_separator)"
        )

    def prompt_ids(self, prompt: str) -> list[int]:
        """A document that begins with the prompt."""
        return [DOCUMENT_START_ID, *self.tokenizer.encode(prompt)]

    def describe(self) -> str:
        """The amounts of text, for the terminal."""
        return (
            f"Data    {_tokens_in(self.training_sources):,} training tokens, seen "
            f"{self.epochs_at(self.config.total_steps):.2f} times; {_tokens_in(self.validation_sources):,} held out, "
            f"{len(self.validation_places()):,} windows of them evaluated"
        )

    def read_tokenizer(self) -> Tokenizer:
        """The tokenizer that the configuration names, or the one trained on its corpus, trained now if need be."""
        if self.config.tokenizer.path is not None:
            return super().read_tokenizer()
        folder = self.prepared / f"tokenizer-{self._tokenizer_key()}"
        return Tokenizer.load(prepared_tokenizer(folder, self._train_tokenizer))

    def _train_tokenizer(self) -> Tokenizer:
        """A tokenizer of the corpus."""
        size = self.config.tokenizer.vocab_size
        log.info("Training a tokenizer of %s entries", f"{size:,}")
        return Tokenizer.train(self._tokenizer_texts(), size, show_progress=sys.stderr.isatty())

    def _tokenizer_texts(self) -> Iterator[str]:
        """Training documents, from each source its share by weight of tokenizer.train_bytes; none held out."""
        data = self.config.data
        total_weight = sum(source.weight for source in data.sources.values())
        for name, source in data.sources.items():
            left = self.config.tokenizer.train_bytes * source.weight / total_weight
            for text, _ in read_documents(name, source, data.skip_broken_lines, ReadCounts()):
                if is_held_out(text, data.validation_fraction):
                    continue
                yield text
                left -= len(text.encode())
                if left <= 0:
                    break

    def _tokenizer_key(self) -> str:
        settings, data = self.config.tokenizer, self.config.data
        sources = [(source_fingerprint(source), source.weight) for source in data.sources.values()]
        return short_hash(sources, settings.vocab_size, int(settings.train_bytes), data.validation_fraction)

    def _shard_folder(self, source: SourceConfig) -> Path:
        data = self.config.data
        settings = (VERSION, data.validation_fraction, data.shard_tokens, data.skip_broken_lines)
        key = short_hash(source_fingerprint(source), self.tokenizer.fingerprint, *settings)
        return self.prepared / f"shards-{key}"


def prepared_tokenizer(folder: Path, make: Callable[[], Tokenizer]) -> Path:
    """The tokenizer.json in a folder of prepared data, made if it is not there.

    Raises:
        UserError: it is damaged or cannot be written, or what `make` raises.
    """

    def fill(partial: Path) -> None:
        tokenizer = make()
        partial.mkdir()
        tokenizer.save(partial / path.name)
        write_sealed(partial / SUMMARY, {"sha256": file_sha256(partial / path.name)})

    path = folder / "tokenizer.json"
    made = prepare_once("tokenizer", folder, fill)
    if not path.exists() or file_sha256(path) != made["sha256"]:
        raise damaged(path, "it is not what was written")
    return path


def held_out_stream(prepared: Path, identity: str, tokenizer: Tokenizer, vocab_size: int) -> TokenStream | None:
    """The held-out tokens of a source of a run, found again.

    Args:
        prepared: data.prepared_dir of the run.
        identity: Of its training data; see `OpenedSource`.
        tokenizer, vocab_size: Those of the run.

    Returns:
        None if they are not there any more.

    Raises:
        PreparedDataError: they are damaged.
    """
    for manifest in prepared.glob(f"shards-*/train/{MANIFEST}"):
        if file_sha256(manifest) == identity:
            return TokenStream.open(manifest.parents[1] / "validation", tokenizer.fingerprint, vocab_size)
    return None


def _tokens_in(sources: list[StreamWindows]) -> int:
    return sum(len(source.stream) for source in sources)
