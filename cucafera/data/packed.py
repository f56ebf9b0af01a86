"""Pretraining data: windows of a token stream, cut wherever they are full.

T  sequence_length
"""

import hashlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cucafera.config.errors import UserError
from cucafera.config.schema import Config, SourceConfig
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.prepared import SUMMARY, damaged, prepare_once
from cucafera.data.run_data import RunData, load_tokenizer, short_hash
from cucafera.data.shards import MANIFEST, VERSION, TokenStream
from cucafera.data.sources import is_held_out, open_source
from cucafera.data.tokenize import tokenize_source
from cucafera.data.tokenizer import Tokenizer
from cucafera.data.windows import OpenedSource, Window
from cucafera.storage import file_sha256, write_json_with_checksum

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


class DocumentData(RunData[StreamWindows]):
    """The documents of a pretraining run, tokenized and packed."""

    def describe(self) -> str:
        """Return the amounts of text, for the terminal."""
        return (
            f"Data    {_tokens_in(self.training):,} training tokens, seen "
            f"{self.epochs_at(self.config.total_steps):.2f} times; {_tokens_in(self.validation):,} held out, "
            f"{len(self.validation_positions()):,} windows of them evaluated"
        )


def open_documents(config: Config) -> DocumentData:
    """Train or load the tokenizer, tokenize the sources into shards, and open their windows.

    What was prepared before, for this run or another, is found by the hash of what it was made from.

    Raises:
        UserError: A source cannot be read, or there is too little text for one training or one validation window.
    """
    tokenizer = load_tokenizer(config) if config.tokenizer.path is not None else _trained_tokenizer(config)
    folders = {name: _tokenized(name, source, config, tokenizer) for name, source in config.data.sources.items()}
    sources = {name: _opened(name, folder, config, tokenizer) for name, folder in folders.items()}
    data = DocumentData(config, tokenizer, sources)
    if not data.validation_positions():
        raise UserError(
            f"the held-out documents give {_tokens_in(data.validation):,} tokens; one window needs "
            f"{config.sequence_length + 1:,}: give more documents, or a larger data.validation_fraction (a .txt file "
            "is one document unless its source has a document_separator)"
        )
    return data


def _tokenized(name: str, source: SourceConfig, config: Config, tokenizer: Tokenizer) -> Path:
    """The folder with the shards of a source, made if it is not there."""
    data = config.data
    settings = (VERSION, data.validation_fraction, data.shard_tokens, data.skip_broken_lines)
    key = short_hash(open_source(name, source).fingerprint(), tokenizer.fingerprint, *settings)
    folder = Path(data.prepared_dir) / f"shards-{key}"
    tokenize_source(name, source, tokenizer, data, folder)
    return folder


def _opened(name: str, folder: Path, config: Config, tokenizer: Tokenizer) -> OpenedSource[StreamWindows]:
    """The windows of the shards of a source."""
    length, vocab_size = config.sequence_length, config.model.vocab_size
    training, validation = (
        StreamWindows(TokenStream.open(folder / split, tokenizer.fingerprint, vocab_size), length)
        for split in ("train", "validation")
    )
    if not len(training):
        raise UserError(
            f"data.sources.{name} gives {len(training.stream):,} training tokens; one window needs {length + 1:,} "
            "(sequence_length + 1): give more text, or a smaller sequence_length"
        )
    manifest = (folder / "train" / MANIFEST).read_bytes()
    return OpenedSource(training, validation, hashlib.sha256(manifest).hexdigest())


def _trained_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of the corpus, trained if it is not there."""
    settings, data = config.tokenizer, config.data
    sources = [(open_source(name, source).fingerprint(), source.weight) for name, source in data.sources.items()]
    key = short_hash(sources, settings.vocab_size, settings.train_bytes, data.validation_fraction)

    def train() -> Tokenizer:
        log.info("Training a tokenizer of %s entries", f"{settings.vocab_size:,}")
        return Tokenizer.train(_tokenizer_texts(config), settings.vocab_size, show_progress=sys.stderr.isatty())

    return Tokenizer.load(prepared_tokenizer(Path(data.prepared_dir) / f"tokenizer-{key}", train))


def _tokenizer_texts(config: Config) -> Iterator[str]:
    """Training documents, from each source its share by weight of tokenizer.train_bytes; none held out."""
    data = config.data
    total_weight = sum(source.weight for source in data.sources.values())
    for name, source in data.sources.items():
        left = config.tokenizer.train_bytes * source.weight / total_weight
        for text, _ in open_source(name, source, data.skip_broken_lines).documents():
            if is_held_out(text, data.validation_fraction):
                continue
            yield text
            left -= len(text.encode())
            if left <= 0:
                break


def prepared_tokenizer(folder: Path, make: Callable[[], Tokenizer]) -> Path:
    """Return the tokenizer.json in a folder of prepared data, made if it is not there.

    Raises:
        UserError: it is damaged or cannot be written, or what `make` raises.
    """

    def fill(partial: Path) -> None:
        tokenizer = make()
        partial.mkdir()
        tokenizer.save(partial / path.name)
        write_json_with_checksum(partial / SUMMARY, {"sha256": file_sha256(partial / path.name)})

    path = folder / "tokenizer.json"
    made = prepare_once("tokenizer", folder, fill)
    if not path.exists() or file_sha256(path) != made["sha256"]:
        raise damaged(path, "checksum mismatch")
    return path


def held_out_stream(prepared: Path, fingerprint: str, tokenizer: Tokenizer, vocab_size: int) -> TokenStream | None:
    """Find the held-out tokens of a source of a run.

    Args:
        prepared: data.prepared_dir of the run.
        fingerprint: Of its training data; see `OpenedSource`.
        tokenizer, vocab_size: Those of the run.

    Returns:
        None if they are gone.

    Raises:
        PreparedDataError: they are damaged.
    """
    for manifest in prepared.glob(f"shards-*/train/{MANIFEST}"):
        if file_sha256(manifest) == fingerprint:
            return TokenStream.open(manifest.parents[1] / "validation", tokenizer.fingerprint, vocab_size)
    return None


def _tokens_in(sources: list[StreamWindows]) -> int:
    return sum(len(source.stream) for source in sources)
