"""Pretraining data: windows of a token stream, cut wherever they are full.

T  sequence_length
"""

import hashlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cucafera.config.errors import UserError
from cucafera.config.schema import Config, SourceConfig
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.left_out import LeftOut
from cucafera.data.prepared import SUMMARY, PreparationProgress, damaged, prepare_once, prepared_folders
from cucafera.data.run_data import RunData, load_tokenizer, short_hash
from cucafera.data.sample import TextSample, shares_by_weight
from cucafera.data.shards import MANIFEST, TokenStream
from cucafera.data.shards import VERSION as SHARDS_VERSION
from cucafera.data.sources import open_source
from cucafera.data.split import VERSION as SPLIT_VERSION
from cucafera.data.split import find_split
from cucafera.data.tokenize import VERSION, TokenizedSource, batches_of, tokenize_source
from cucafera.data.tokenizer import Tokenizer, excerpts
from cucafera.data.windows import OpenedSource, Window
from cucafera.quantities import data_size, number_of
from cucafera.storage import file_sha256, write_json_with_checksum

log = logging.getLogger(__name__)

STREAMED_SAMPLES = 10
"""Of a source that comes over the network, text of this many times tokenizer.train_bytes is sampled, not all."""
STRETCHES = 16
"""Of a long stream, in which the lengths of documents are counted."""
TOKENIZER_VERSION = 2
"""Increased whenever another tokenizer would be trained on the same text."""


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

    def lengths(self, most_tokens: int) -> NDArray[np.int64]:
        """Return the tokens of documents, their start tokens included: of all, or of some stretches of the stream.

        Args:
            most_tokens: Of a longer stream, as many are read, in stretches spread evenly over it. A document counts if
                it begins and ends within one, so those longer than a stretch do not.
        """
        total = len(self.stream)
        if total <= most_tokens:
            return np.diff(np.append(self._starts(0, total), total))
        stretch = -(-most_tokens // STRETCHES)
        firsts = [number * (total - stretch) // (STRETCHES - 1) for number in range(STRETCHES)]
        return np.concatenate([np.diff(self._starts(first, stretch)) for first in firsts])

    def _starts(self, first: int, length: int) -> NDArray[np.int64]:
        return np.flatnonzero(self.stream.read(first, length) == DOCUMENT_START_ID)


class DocumentData(RunData[StreamWindows]):
    """The documents of a pretraining run, tokenized and packed."""

    def describe(self) -> str:
        """Return the amounts of text, and what should be known of the sources, for the terminal."""
        return "\n        ".join([self._amounts(), *self.notes])

    def _amounts(self) -> str:
        return (
            f"Data    {number_of(_tokens_in(self.training), 'training token')}, read "
            f"{self.epochs_at(self.config.total_steps):.2f} times; validation on "
            f"{number_of(len(self.validation_positions()), 'window')} of the {_tokens_in(self.validation):,} held out"
        )


def open_documents(config: Config) -> DocumentData:
    """Train or load the tokenizer, tokenize the sources into shards, and open their windows.

    What was prepared before, for this run or another, is found by the hash of what it was made from.

    Raises:
        UserError: A source cannot be read, or there is too little text for one training or one validation window.
    """
    tokenizer = load_tokenizer(config) if config.tokenizer.path is not None else _trained_tokenizer(config)
    sources: dict[str, OpenedSource[StreamWindows]] = {}
    left_out: list[LeftOut] = []
    for name, source in config.data.sources.items():
        folder, counts = _tokenized(name, source, config, tokenizer)
        left_out += counts.left_out(name)
        sources[name] = _opened(name, folder, config, tokenizer, counts)
    data = DocumentData(config, tokenizer, sources, left_out)
    if not data.validation_positions():
        raise UserError(
            f"the held-out documents give {number_of(_tokens_in(data.validation), 'token')}; one window needs "
            f"{config.sequence_length + 1:,}: give more text, or a larger data.validation_fraction (a .txt file is one "
            f"document unless its source has a document_separator){_in_brackets(left_out)}"
        )
    return data


def _tokenized(name: str, source: SourceConfig, config: Config, tokenizer: Tokenizer) -> tuple[Path, TokenizedSource]:
    """The folder with the shards of a source, made if it is not there, and its counts."""
    data = config.data
    settings = (
        *(SHARDS_VERSION, SPLIT_VERSION, VERSION),
        *(data.validation_fraction, data.shard_tokens, data.skip_broken_lines),
    )
    key = short_hash(open_source(name, source).fingerprint(), tokenizer.fingerprint, *settings)
    folder = Path(data.prepared_dir) / f"shards-{key}"
    return folder, tokenize_source(name, source, tokenizer, data, folder)


def _opened(
    name: str, folder: Path, config: Config, tokenizer: Tokenizer, counts: TokenizedSource
) -> OpenedSource[StreamWindows]:
    """The windows of the shards of a source."""
    length, vocab_size = config.sequence_length, config.model.vocab_size
    training, validation = (
        StreamWindows(TokenStream.open(folder / split, tokenizer.fingerprint, vocab_size), length)
        for split in ("train", "validation")
    )
    if not len(training):
        raise UserError(
            f"data.sources.{name} gives {len(training.stream):,} training tokens; one window needs {length + 1:,} "
            f"(sequence_length + 1): give more text, or a smaller sequence_length{_in_brackets(counts.left_out(name))}"
        )
    manifest = (folder / "train" / MANIFEST).read_bytes()
    return OpenedSource(training, validation, hashlib.sha256(manifest).hexdigest(), counts.notes)


def _trained_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of the corpus, trained if it is not there."""
    settings, data = config.tokenizer, config.data
    sources = [(open_source(name, source).fingerprint(), source.weight) for name, source in data.sources.items()]
    versions = (TOKENIZER_VERSION, SPLIT_VERSION)
    key = short_hash(versions, sources, settings.vocab_size, settings.train_bytes, data.validation_fraction)

    def train() -> Tokenizer:
        samples = _tokenizer_samples(config)
        sizes = ", ".join(f"{data_size(sample.size)} of {name}" for name, sample in samples.items())
        log.info("Training a tokenizer of %s on %s", number_of(settings.vocab_size, "entry"), sizes)

        def texts() -> Iterator[str]:
            return (text for sample in samples.values() for text in sample.texts())

        total = sum(1 for text in texts() for _ in excerpts(text)) if sys.stderr.isatty() else None
        return Tokenizer.train(texts(), settings.vocab_size, total)

    return Tokenizer.load(prepared_tokenizer(Path(data.prepared_dir) / f"tokenizer-{key}", train))


def _tokenizer_samples(config: Config) -> dict[str, TextSample]:
    """Training documents, from each source its share by weight of tokenizer.train_bytes; none held out.

    Each source is read once, unless it is streamed, and its share is a sample of all of it. What a source has too
    little text for is added to the shares of the others.
    """
    data, total = config.data, config.tokenizer.train_bytes
    samples: dict[str, TextSample] = {}
    for name, source in data.sources.items():
        opened = open_source(name, source, data.skip_broken_lines)
        split = find_split(open_source(name, source, data.skip_broken_lines), data.validation_fraction)
        samples[name] = sample = TextSample(total)
        with PreparationProgress(f"Sampling texts of {name} for the tokenizer", opened.size_bytes()) as progress:
            read = 0
            for batch in batches_of(opened.documents()):
                for text in batch.texts:
                    for part, is_held_out in split.parts(text):
                        if not is_held_out:
                            sample.add(part)
                progress.advance(batch.input_bytes, batch.characters, 0)
                read += batch.characters
                if opened.is_streamed and read > STREAMED_SAMPLES * total:
                    break
        # Shares only shrink with further sources, so never more than twice train_bytes are in memory.
        weights = {name: data.sources[name].weight for name in samples}
        for name, share in shares_by_weight(total, weights, {name: sample.size for name, sample in samples.items()}):
            samples[name].limit(share)
    return samples


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
    for folder in prepared_folders(prepared, "shards-"):
        manifest = folder / "train" / MANIFEST
        if manifest.is_file() and file_sha256(manifest) == fingerprint:
            return TokenStream.open(folder / "validation", tokenizer.fingerprint, vocab_size)
    return None


def _in_brackets(left_out: Sequence[LeftOut]) -> str:
    """Return what was left out, as the end of a message about too little text."""
    return f" ({'; '.join(map(str, left_out))})" if left_out else ""


def _tokens_in(sources: list[StreamWindows]) -> int:
    return sum(len(source.stream) for source in sources)
