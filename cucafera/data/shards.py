"""Token shards: the format of prepared text, its writer and reader, and the way there from a corpus.

A shard is a header of 16 KiB (one line with a checksum, then JSON: try `head -c 1000`) and token ids as
little-endian uint16. A folder of shards holds one stream of tokens, cut wherever a file is full, and the manifest
shards.json, which is written last: without it there is nothing. Each block of tokens has its CRC-32 in the header,
compared when the block is first read; so a stream of any length opens at once, and damage is found before use.
Tokens are read, and not mapped: pages of a mapping count as memory of the process, up to the size of all its shards.
"""

import json
import multiprocessing
import os
import signal
import threading
import zlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cucafera.config import SourceConfig
from cucafera.data.corpus import CorpusError, Document, ReadCounts, is_held_out, read_documents, source_bytes
from cucafera.data.files import PARTIAL, NotAsWrittenError, ReadFile, flush, read_sealed, write_sealed
from cucafera.data.prepared import (
    SUMMARY,
    PreparationProgress,
    PreparedDataError,
    damaged,
    prepare_once,
    start_again,
)
from cucafera.data.tokenizer import DOCUMENT_START_ID, Tokenizer

Tokens = NDArray[np.uint16]

VERSION = 1
MAGIC = b"cucafera shard, header crc32 "
HEADER_BYTES = 16_384
BLOCK_TOKENS = 262_144
MOST_BLOCKS = 1024
"""Checksums that the header has room for."""
TOKEN_TYPE = np.dtype("<u2")
MANIFEST = "shards.json"
MOST_OPEN_FILES = 256
"""Of one stream; many systems let a process have 1,024."""

BATCH_BYTES = 1 << 20
"""Text that a process tokenizes at a time."""
SMALL_CORPUS_BATCHES = 8
"""A corpus of fewer batches is done before another process has even started."""


class ShardWriter:
    """Writes one stream of tokens into a folder of shards.

    Args:
        folder: Is made; must not hold shards.
        tokenizer_fingerprint: Of the tokenizer that made the tokens.
        shard_tokens: Tokens of one file.
    """

    def __init__(self, folder: Path, tokenizer_fingerprint: str, shard_tokens: int) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._tokenizer = tokenizer_fingerprint
        self._shard_tokens = shard_tokens
        self._block_tokens = BLOCK_TOKENS
        while -(-shard_tokens // self._block_tokens) > MOST_BLOCKS:
            self._block_tokens *= 2
        self._file: BinaryIO | None = None
        self._shards: list[dict[str, Any]] = []

    def append(self, tokens: Tokens) -> None:
        """Appends tokens [n] to the stream."""
        while tokens.size:
            if self._file is None:
                self._begin_shard()
            taken = min(tokens.size, self._shard_tokens - self._count, self._block_tokens - self._count_in_block)
            self._write(tokens[:taken].astype(TOKEN_TYPE, copy=False))
            tokens = tokens[taken:]
            if self._count == self._shard_tokens:
                self._end_shard()

    def close(self) -> None:
        """Ends the last shard and writes the manifest: from now on the stream is there."""
        if self._file is not None:
            self._end_shard()
        manifest = {
            "version": VERSION,
            "tokenizer": self._tokenizer,
            "tokens": sum(shard["tokens"] for shard in self._shards),
            "shards": self._shards,
        }
        write_sealed(self._folder / MANIFEST, manifest)

    def abandon(self) -> None:
        """Closes the file that is being written, when there will be no manifest."""
        if self._file is not None:
            with suppress(OSError):  # a full disk has no room for what is still in the buffer
                self._file.close()

    @property
    def _count_in_block(self) -> int:
        return self._count % self._block_tokens

    def _begin_shard(self) -> None:
        self._path = self._folder / f"{len(self._shards):05d}.shard"
        self._file = self._path.with_suffix(PARTIAL).open("wb")
        self._file.write(bytes(HEADER_BYTES))
        self._count = 0
        self._max_id = 0
        self._checksums: list[int] = []

    def _write(self, tokens: Tokens) -> None:
        assert self._file is not None
        content = tokens.data
        self._file.write(content)
        if self._count_in_block == 0:
            self._checksums.append(0)
        self._checksums[-1] = zlib.crc32(content, self._checksums[-1])
        self._count += tokens.size
        self._max_id = max(self._max_id, int(tokens.max()))

    def _end_shard(self) -> None:
        assert self._file is not None
        described = {
            "version": VERSION,
            "dtype": "uint16, little-endian",
            "tokens": self._count,
            "max_id": self._max_id,
            "tokenizer": self._tokenizer,
            "block_tokens": self._block_tokens,
            "block_crc32": self._checksums,
        }
        header = _header(described)
        with self._file as file:
            file.seek(0)
            file.write(header)
            flush(file)
        self._file = None
        self._path.with_suffix(PARTIAL).replace(self._path)
        self._shards.append({"name": self._path.name, "tokens": self._count, "header_crc32": zlib.crc32(header)})


class TokenStream:
    """A stream of tokens, read from wherever one likes. `len` gives its tokens. Made by `open`; can be pickled."""

    def __init__(self, folder: Path, shards: list["_Shard"]) -> None:
        self._folder = folder
        self._shards = shards
        self._ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
        self._open_files: dict[int, ReadFile] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open_files": {}}  # each process opens the files itself

    @classmethod
    def open(cls, folder: Path, tokenizer_fingerprint: str, vocab_size: int) -> "TokenStream":
        """Opens a folder of shards; reads the headers only, in time that grows with the number of files.

        Args:
            folder: Where the shards are.
            tokenizer_fingerprint: Of the tokenizer that the run uses.
            vocab_size: Ids must be below it.

        Raises:
            PreparedDataError: nothing complete is there, it is damaged, of another version or another tokenizer.
        """
        try:
            manifest = read_sealed(folder / MANIFEST)
        except FileNotFoundError as error:
            raise PreparedDataError(f"{folder} holds no prepared tokens: it has no {MANIFEST}") from error
        except NotAsWrittenError as error:
            raise damaged(folder / MANIFEST, str(error)) from error
        if manifest.get("version") != VERSION:
            raise PreparedDataError(
                f"{folder} has format version {manifest.get('version')}, and this program reads {VERSION}. "
                + start_again(folder)
            )
        if manifest["tokenizer"] != tokenizer_fingerprint:
            raise PreparedDataError(
                f"the tokens in {folder} were made by another tokenizer: its fingerprint is {manifest['tokenizer']}, "
                f"that of the tokenizer in use {tokenizer_fingerprint}. {start_again(folder)}"
            )
        return cls(folder, [_open_shard(folder, entry, vocab_size) for entry in manifest["shards"]])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._shards else 0

    def read(self, start: int, length: int) -> Tokens:
        """A copy of the tokens start, ..., start + length - 1, as uint16 [length].

        Raises:
            IndexError: they are not all within the stream.
            PreparedDataError: a block that holds some of them is not what was written.
        """
        if not 0 <= start <= start + length <= len(self):
            raise IndexError(f"tokens {start} to {start + length} of a stream of {len(self)}")
        tokens = np.empty(length, dtype=np.uint16)
        filled = 0
        number = int(np.searchsorted(self._ends, start, side="right"))
        while filled < length:
            shard = self._shards[number]
            offset = start + filled - (int(self._ends[number]) - shard.tokens)
            part = shard.read(self._file(number), offset, min(length - filled, shard.tokens - offset))
            tokens[filled : filled + part.size] = part
            filled += part.size
            number += 1
        return tokens

    def _file(self, number: int) -> ReadFile:
        """The file of a shard, opened when it is first read; of too many, the one opened first is closed."""
        if number not in self._open_files:
            if len(self._open_files) == MOST_OPEN_FILES:
                del self._open_files[next(iter(self._open_files))]
            self._open_files[number] = self._shards[number].open()
        return self._open_files[number]


class _Shard:
    """One file, and which of its blocks are verified."""

    def __init__(self, path: Path, tokens: int, block_tokens: int, checksums: list[int]) -> None:
        self.path = path
        self.tokens = tokens
        self._block_tokens = block_tokens
        self._checksums = checksums
        self._verified = np.zeros(len(checksums), dtype=np.bool_)

    def open(self) -> ReadFile:
        """Opens the file."""
        try:
            return ReadFile(self.path)
        except OSError as error:
            raise damaged(self.path, f"it cannot be read ({error.strerror})") from error

    def read(self, file: ReadFile, start: int, length: int) -> Tokens:
        """Tokens of the opened file, their blocks verified."""
        for block in range(start // self._block_tokens, (start + length - 1) // self._block_tokens + 1):
            if not self._verified[block]:
                self._verify(file, block)
        return np.frombuffer(self._content(file, start, length), TOKEN_TYPE)

    def _verify(self, file: ReadFile, block: int) -> None:
        start = block * self._block_tokens
        content = self._content(file, start, min(self._block_tokens, self.tokens - start))
        if zlib.crc32(content) != self._checksums[block]:
            raise damaged(self.path, f"block {block} (at token {start:,}) is not what was written")
        self._verified[block] = True

    def _content(self, file: ReadFile, start: int, length: int) -> bytes:
        """Bytes of tokens."""
        size = length * TOKEN_TYPE.itemsize
        try:
            content = file.read(HEADER_BYTES + start * TOKEN_TYPE.itemsize, size)
        except OSError as error:
            raise damaged(self.path, f"it cannot be read ({error.strerror})") from error
        if len(content) < size:
            raise damaged(self.path, "it has been cut short")
        return content


def _open_shard(folder: Path, entry: dict[str, Any], vocab_size: int) -> _Shard:
    """Checks the file that a manifest entry describes."""
    path = folder / entry["name"]
    if path.parent != folder:  # a manifest that somebody else made may name any file of this machine
        raise PreparedDataError(f"{folder / MANIFEST} names a file of another folder, {entry['name']}")
    expected = HEADER_BYTES + entry["tokens"] * TOKEN_TYPE.itemsize
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = file.read(HEADER_BYTES)
    except OSError as error:
        raise damaged(path, f"it cannot be read ({error.strerror})") from error
    if size != expected:
        raise damaged(path, f"it has {size:,} bytes instead of {expected:,}")
    if zlib.crc32(header) != entry["header_crc32"] or (described := _parsed_header(header)) is None:
        raise damaged(path, "its header is not what was written")
    if described["max_id"] >= vocab_size:
        raise PreparedDataError(
            f"{path} holds the id {described['max_id']:,}; the vocabulary has {vocab_size:,} entries. "
            + start_again(folder)
        )
    return _Shard(path, described["tokens"], described["block_tokens"], described["block_crc32"])


def _header(described: dict[str, Any]) -> bytes:
    """A header of HEADER_BYTES: MAGIC and the checksum of the rest on one line, then JSON and spaces."""
    content = json.dumps(described).encode()
    first_line = len(MAGIC) + 9
    content = content.ljust(HEADER_BYTES - first_line - 1) + b"\n"
    return MAGIC + b"%08x\n" % zlib.crc32(content) + content


def _parsed_header(header: bytes) -> dict[str, Any] | None:
    """What a header says, or None when it is damaged."""
    first_line, _, content = header.partition(b"\n")
    if first_line != MAGIC + b"%08x" % zlib.crc32(content):
        return None
    described: dict[str, Any] = json.loads(content)
    return described


@dataclass
class PreparedSource:
    """What became of the text of one source: the content of prepared.json."""

    tokenizer: str = ""
    """Fingerprint."""
    documents: int = 0
    """Training documents."""
    tokens: int = 0
    """Training tokens, with one document-start token a document."""
    text_bytes: int = 0
    """UTF-8 bytes of the training documents."""
    held_out_documents: int = 0
    held_out_tokens: int = 0
    held_out_text_bytes: int = 0
    empty_documents: int = 0
    """Left out: null, empty or only whitespace."""
    broken_lines: int = 0
    """Left out because they cannot be read."""
    bytes_per_token: float = 0.0
    """UTF-8 bytes that a token stands for, document-start tokens apart, over all documents."""


class _Encoded(NamedTuple):
    """What becomes of a batch of documents."""

    training: Tokens
    held_out: Tokens
    held_out_documents: int
    held_out_bytes: int
    documents: int
    text_bytes: int
    input_bytes: int


class _Batch(NamedTuple):
    texts: list[str]
    input_bytes: int


def prepare_source(
    name: str,
    source: SourceConfig,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    validation_fraction: float,
    shard_tokens: int,
    skip_broken_lines: bool,
    processes: int | None,
) -> PreparedSource:
    """Turns one source into two streams of tokens, folder/train and folder/validation, unless they are there.

    The folder appears whole or not at all, and is the same for any number of processes. Of several programs that
    want the same folder one makes it, and the others wait.

    Args:
        name: The source's name in the configuration, for messages.
        source: The text.
        tokenizer: Makes its tokens.
        folder: Is made.
        validation_fraction: Share of documents held out.
        shard_tokens: Tokens of one shard file.
        skip_broken_lines: Leave out and count lines that cannot be read.
        processes: Processes that tokenize; None: one a core.

    Raises:
        UserError: the source cannot be read or has no document, or the folder cannot be written.
    """

    def fill(partial: Path) -> None:
        _prepare(name, source, tokenizer, partial, validation_fraction, shard_tokens, skip_broken_lines, processes)

    return PreparedSource(**prepare_once(f"data.sources.{name}", folder, fill))


def _prepare(
    name: str,
    source: SourceConfig,
    tokenizer: Tokenizer,
    folder: Path,
    validation_fraction: float,
    shard_tokens: int,
    skip_broken_lines: bool,
    processes: int | None,
) -> None:
    """Fills a folder."""
    counts = ReadCounts()
    summary = PreparedSource(tokenizer=tokenizer.fingerprint)
    training = ShardWriter(folder / "train", tokenizer.fingerprint, shard_tokens)
    held_out = ShardWriter(folder / "validation", tokenizer.fingerprint, shard_tokens)
    try:
        batches = _batches(read_documents(name, source, skip_broken_lines, counts))
        with (
            PreparationProgress(f"Tokenizing {name}", source_bytes(source)) as progress,
            closing(_encoded(batches, tokenizer, validation_fraction, processes)) as results,
        ):
            for encoded in results:
                training.append(encoded.training)
                held_out.append(encoded.held_out)
                _count(summary, encoded)
                progress.advance(
                    encoded.input_bytes,
                    encoded.text_bytes + encoded.held_out_bytes,
                    encoded.training.size + encoded.held_out.size,
                )
        if not counts.documents:
            raise CorpusError(_no_document(name, counts))
        summary.empty_documents, summary.broken_lines = counts.empty, counts.broken
        documents = summary.documents + summary.held_out_documents
        tokens = summary.tokens + summary.held_out_tokens - documents
        summary.bytes_per_token = (summary.text_bytes + summary.held_out_text_bytes) / tokens
        training.close()
        held_out.close()
        write_sealed(folder / SUMMARY, asdict(summary))
    except BaseException:
        training.abandon()
        held_out.abandon()
        raise


def _no_document(name: str, counts: ReadCounts) -> str:
    left_out = f"{counts.empty:,} were empty, {counts.broken:,} could not be read"
    first = f" (the first: {counts.first_broken})" if counts.broken else ""
    return f"data.sources.{name} holds no document: {left_out}{first}"


def _count(summary: PreparedSource, encoded: _Encoded) -> None:
    summary.documents += encoded.documents
    summary.tokens += encoded.training.size
    summary.text_bytes += encoded.text_bytes
    summary.held_out_documents += encoded.held_out_documents
    summary.held_out_tokens += encoded.held_out.size
    summary.held_out_text_bytes += encoded.held_out_bytes


def _batches(documents: Iterable[Document]) -> Iterator[_Batch]:
    """Documents together until they have BATCH_BYTES."""
    texts: list[str] = []
    size = input_bytes = 0
    for text, read in documents:
        texts.append(text)
        size += len(text)
        input_bytes += read
        if size >= BATCH_BYTES:
            yield _Batch(texts, input_bytes)
            texts, size, input_bytes = [], 0, 0
    if texts:
        yield _Batch(texts, input_bytes)


def _encoded(
    batches: Iterator[_Batch], tokenizer: Tokenizer, fraction: float, processes: int | None
) -> Generator[_Encoded, None, None]:
    """Encodes batches, in their order, here or in processes."""
    processes = processes or _cores()
    begun = list(islice(batches, SMALL_CORPUS_BATCHES))
    batches = chain(begun, batches)
    if processes == 1 or len(begun) < SMALL_CORPUS_BATCHES:
        return (_encode(tokenizer, fraction, batch) for batch in batches)
    return _encoded_by_processes(batches, tokenizer, fraction, processes)


def _cores() -> int:
    """Cores that this process may use; not every system can say which those are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _encoded_by_processes(
    batches: Iterator[_Batch], tokenizer: Tokenizer, fraction: float, processes: int
) -> Generator[_Encoded, None, None]:
    """Keeps a bounded number of batches under way, so that memory does not grow with the corpus."""
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads of torch and tokenizers, half alive
    pool = ProcessPoolExecutor(processes, context, _begin_worker, (tokenizer, fraction))
    under_way: deque[Future[_Encoded]] = deque()
    try:
        for batch in batches:
            under_way.append(pool.submit(_encode_in_worker, batch))
            if len(under_way) > 2 * processes:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}


def _begin_worker(tokenizer: Tokenizer, fraction: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and that one ends the work
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has a core to itself
    _worker.update(tokenizer=tokenizer, fraction=fraction)


def _end_with_parent() -> None:
    """A parent that is killed tells nobody; without this its workers would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(batch: _Batch) -> _Encoded:
    return _encode(_worker["tokenizer"], _worker["fraction"], batch)


def _encode(tokenizer: Tokenizer, fraction: float, batch: _Batch) -> _Encoded:
    start = np.array([DOCUMENT_START_ID], dtype=np.uint16)
    sides: dict[bool, list[Tokens]] = {False: [np.empty(0, np.uint16)], True: [np.empty(0, np.uint16)]}
    documents, text_bytes = {False: 0, True: 0}, {False: 0, True: 0}
    for text, ids in zip(batch.texts, tokenizer.encode_batch(batch.texts), strict=True):
        side = is_held_out(text, fraction)
        sides[side] += [start, ids]
        documents[side] += 1
        text_bytes[side] += len(text.encode())
    return _Encoded(
        training=np.concatenate(sides[False]),
        held_out=np.concatenate(sides[True]),
        held_out_documents=documents[True],
        held_out_bytes=text_bytes[True],
        documents=documents[False],
        text_bytes=text_bytes[False],
        input_bytes=batch.input_bytes,
    )
