"""Text to shards: the documents of a source become two streams of token ids, one to train on and one held out.

source.documents -> batches of 1 MiB -> worker processes encode them -> ShardWriter, in the order of the source
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cucafera.config.schema import DataConfig, SourceConfig
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.left_out import LeftOut, counted
from cucafera.data.prepared import SUMMARY, PreparationProgress, prepare_once
from cucafera.data.shards import ShardWriter, Tokens
from cucafera.data.sources import CorpusError, Source, open_source
from cucafera.data.split import Split, find_split
from cucafera.data.tokenizer import CUT, Tokenizer
from cucafera.storage import write_json_with_checksum

VERSION = 2
"""Increased whenever the same text would be tokenized differently."""
TRAINING, VALIDATION = "train", "validation"
"""Folders of the two streams of a source."""
BATCH_BYTES = 1 << 20
"""Text that a process tokenizes at a time, in characters; a longer document is a batch of its own."""
SMALL_CORPUS_BATCHES = 8
"""A corpus of less text is tokenized before another process has even started."""


@dataclass
class TokenizedSource:
    """Counts of a tokenized source: the content of prepared.json."""

    tokenizer: str = ""
    """Fingerprint."""
    documents: int = 0
    """Training documents."""
    tokens: int = 0
    """Training tokens, with one document-start token per document."""
    text_bytes: int = 0
    """UTF-8 bytes of the training documents."""
    held_out_documents: int = 0
    held_out_tokens: int = 0
    held_out_text_bytes: int = 0
    empty_documents: int = 0
    """Left out: null, empty or only whitespace."""
    broken_lines: int = 0
    """Left out because they cannot be read."""
    first_broken: str = ""
    """Position of the first of those, and what is wrong with it."""
    cut_documents: int = 0
    """Documents with a word that is too long for the tokenizer; see `Tokenizer.texts_cut`."""
    notes: list[str] = field(default_factory=list)
    """Facts about the source and its split that a person should know, as clauses."""

    def left_out(self, source: str) -> list[LeftOut]:
        """Return what was left out of a source, and what was not used as it is."""
        documents = self.documents + self.held_out_documents
        rows = documents + self.empty_documents + self.broken_lines
        return counted(
            LeftOut(source, self.broken_lines, rows, "rows could not be read: left out", self.first_broken),
            LeftOut(source, self.empty_documents, rows, "documents are empty: left out"),
            LeftOut(source, self.cut_documents, documents, f"documents {CUT}"),
        )


class DocumentBatch(NamedTuple):
    """Documents of about BATCH_BYTES, and the bytes of input that they took."""

    texts: list[str]
    characters: int
    input_bytes: int


class _Encoded(NamedTuple):
    """Documents of a batch on one side of the split."""

    tokens: Tokens
    documents: int
    text_bytes: int


class _EncodedBatch(NamedTuple):
    training: _Encoded
    held_out: _Encoded
    cut_documents: int
    input_bytes: int


def tokenize_source(
    name: str, config: SourceConfig, tokenizer: Tokenizer, data: DataConfig, folder: Path
) -> TokenizedSource:
    """Turn one source into two streams of tokens, folder/train and folder/validation, unless they exist.

    The folder appears atomically, and is the same for any number of processes. Of several programs that want the same
    folder one makes it, and the others wait.

    Args:
        name: The source's name in the configuration.
        config: Where its text is.
        tokenizer: Makes its tokens.
        data: Held-out fraction, size of shards, number of processes.
        folder: Is made.

    Raises:
        UserError: The source cannot be read or has no document, or the folder cannot be written.
    """
    source = open_source(name, config, data.skip_broken_lines)

    def fill(partial_folder: Path) -> None:
        split = find_split(open_source(name, config, data.skip_broken_lines), data.validation_fraction)
        _write_shards(name, source, split, tokenizer, data, partial_folder)

    return TokenizedSource(**prepare_once(source.name, folder, fill))


def _write_shards(
    name: str, source: Source[Any], split: Split, tokenizer: Tokenizer, data: DataConfig, folder: Path
) -> None:
    """Fill the folder of a source: shards of both streams, then the summary."""
    summary = TokenizedSource(tokenizer=tokenizer.fingerprint)
    encode = partial(_encode, tokenizer, split)
    batches = _encode_all(batches_of(source.documents()), encode, data.processes)
    with (
        ShardWriter(folder / TRAINING, tokenizer.fingerprint, data.shard_tokens) as training,
        ShardWriter(folder / VALIDATION, tokenizer.fingerprint, data.shard_tokens) as held_out,
        PreparationProgress(f"Tokenizing {name}", source.size_bytes()) as progress,
        closing(batches),
    ):
        for batch in batches:
            training.append(batch.training.tokens)
            held_out.append(batch.held_out.tokens)
            summary.documents += batch.training.documents
            summary.tokens += batch.training.tokens.size
            summary.text_bytes += batch.training.text_bytes
            summary.held_out_documents += batch.held_out.documents
            summary.held_out_tokens += batch.held_out.tokens.size
            summary.held_out_text_bytes += batch.held_out.text_bytes
            summary.cut_documents += batch.cut_documents
            text_bytes = batch.training.text_bytes + batch.held_out.text_bytes
            progress.advance(batch.input_bytes, text_bytes, batch.training.tokens.size + batch.held_out.tokens.size)
        counts = source.counts
        if not counts.documents:
            left_out = f"{counts.empty:,} were empty, {counts.broken:,} could not be read"
            first = f" (the first: {counts.first_broken})" if counts.broken else ""
            raise CorpusError(f"{source.name} holds no document: {left_out}{first}")
    summary.empty_documents = counts.empty
    summary.broken_lines, summary.first_broken = counts.broken, counts.first_broken
    summary.notes = [*counts.notes, *([split.note] if split.note else [])]
    write_json_with_checksum(folder / SUMMARY, asdict(summary))


def batches_of(documents: Iterable[tuple[str, int]]) -> Iterator[DocumentBatch]:
    """Collect documents until they have BATCH_BYTES."""
    texts: list[str] = []
    size = input_bytes = 0
    for text, read in documents:
        texts.append(text)
        size += len(text)
        input_bytes += read
        if size >= BATCH_BYTES:
            yield DocumentBatch(texts, size, input_bytes)
            texts, size, input_bytes = [], 0, 0
    if texts:
        yield DocumentBatch(texts, size, input_bytes)


def _encode(tokenizer: Tokenizer, split: Split, batch: DocumentBatch) -> _EncodedBatch:
    """Split the documents of a batch, and encode each after a document-start token."""
    start = np.array([DOCUMENT_START_ID], dtype=np.uint16)
    parts: tuple[list[Tokens], list[Tokens]] = ([], [])
    documents, text_bytes = [0, 0], [0, 0]
    cut_before = tokenizer.texts_cut
    documents_of_batch = [part for text in batch.texts for part in split.parts(text)]
    encoded = tokenizer.encode_batch([text for text, _ in documents_of_batch])
    for (text, side), ids in zip(documents_of_batch, encoded, strict=True):
        parts[side].extend((start, ids))
        documents[side] += 1
        text_bytes[side] += len(text.encode())
    training, held_out = (
        _Encoded(np.concatenate([*parts[side], np.empty(0, np.uint16)]), documents[side], text_bytes[side])
        for side in (False, True)
    )
    return _EncodedBatch(training, held_out, tokenizer.texts_cut - cut_before, batch.input_bytes)


Encode = partial[_EncodedBatch]
"""`_encode` of a tokenizer and a split: takes a batch."""


def _encode_all(
    batches: Iterator[DocumentBatch], encode: Encode, processes: int | None
) -> Generator[_EncodedBatch, None, None]:
    """Yield encoded batches in their order, from this process or, for a large corpus, from several."""
    processes = processes or _usable_cores()
    first: list[DocumentBatch] = []
    characters = 0
    while characters < SMALL_CORPUS_BATCHES * BATCH_BYTES and (batch := next(batches, None)) is not None:
        first.append(batch)
        characters += batch.characters
    batches = chain(first, batches)
    if processes == 1 or characters < SMALL_CORPUS_BATCHES * BATCH_BYTES:
        yield from map(encode, batches)
        return
    # spawn: fork would copy the threads of torch and tokenizers with their locks held, and deadlock.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker, (encode,))
    # Two batches per process in flight keep all of them busy while this one reads and writes; memory stays constant
    # however large the corpus. Of documents longer than a batch, there are fewer: one per process, and one more.
    # Results are taken in the order of submission, so the shards do not depend on timing.
    in_flight: deque[tuple[Future[_EncodedBatch], int]] = deque()
    try:
        for batch in batches:
            in_flight.append((pool.submit(_encode_in_worker, batch), batch.characters))
            if len(in_flight) > processes and sum(size for _, size in in_flight) > 2 * processes * BATCH_BYTES:
                yield in_flight.popleft()[0].result()
        while in_flight:
            yield in_flight.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _usable_cores() -> int:
    """Return the cores that this process may use; macOS knows only those of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_worker_encode: Encode
"""Of this worker process: sent once, when it starts, since the tokenizer has megabytes and a cache of words."""


def _start_worker(encode: Encode) -> None:
    global _worker_encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which shuts the pool down
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core already
    _worker_encode = encode


def _exit_with_parent() -> None:
    """Exit when the parent is gone: a killed parent cannot shut the pool down, and its workers would wait forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(batch: DocumentBatch) -> _EncodedBatch:
    return _worker_encode(batch)
