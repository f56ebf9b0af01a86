"""Token shards: the format of prepared text, its writer and its reader.

A shard is a header of 16 KiB (one line with a checksum, then JSON: try `head -c 1000`) and token ids as
little-endian uint16. A folder of shards holds one stream of tokens, cut wherever a file is full, and the manifest
shards.json, which is written last: without it the folder is incomplete. The header has a CRC-32 per block of tokens,
compared when the block is first read; so a stream of any length opens at once, and damage is found before use.
Tokens are read, not memory-mapped: pages of a mapping count as memory of the process, up to the size of all shards.
"""

import json
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cucafera.data.prepared import PreparedDataError, damaged, start_again
from cucafera.quantities import number_of
from cucafera.storage import (
    PARTIAL,
    ChecksumError,
    PositionalFile,
    flush,
    read_json_with_checksum,
    write_json_with_checksum,
)

Tokens = NDArray[np.uint16]

VERSION = 1
MAGIC = b"cucafera shard, header crc32 "
HEADER_BYTES = 16_384
BLOCK_TOKENS = 262_144
MAX_BLOCKS = 1024
"""Checksums that fit the header."""
TOKEN_TYPE = np.dtype("<u2")
MANIFEST = "shards.json"
MAX_OPEN_FILES = 256
"""Of one stream; many systems allow a process 1,024."""


class ShardWriter:
    """Writes one stream of tokens into a folder of shards; a context manager that closes it if all went well.

    Args:
        folder: Is made; must not exist.
        tokenizer_fingerprint: Of the tokenizer that made the tokens.
        shard_tokens: Tokens per file.
    """

    def __init__(self, folder: Path, tokenizer_fingerprint: str, shard_tokens: int) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._tokenizer = tokenizer_fingerprint
        self._shard_tokens = shard_tokens
        self._block_tokens = BLOCK_TOKENS
        # Few large blocks for a large shard: the header has a fixed size, so that it can be written last.
        while -(-shard_tokens // self._block_tokens) > MAX_BLOCKS:
            self._block_tokens *= 2
        self._file: BinaryIO | None = None
        self._shards: list[dict[str, Any]] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            with suppress(OSError):  # a full disk cannot take what is still in the buffer
                self._file.close()

    def append(self, tokens: Tokens) -> None:
        """Append tokens [n] to the stream."""
        while tokens.size:
            if self._file is None:
                self._start_shard()
            taken = min(tokens.size, self._shard_tokens - self._count, self._block_tokens - self._count_in_block)
            self._write(tokens[:taken].astype(TOKEN_TYPE, copy=False))
            tokens = tokens[taken:]
            if self._count == self._shard_tokens:
                self._finish_shard()

    def close(self) -> None:
        """Finish the last shard and write the manifest, which makes the stream complete."""
        if self._file is not None:
            self._finish_shard()
        manifest = {
            "version": VERSION,
            "tokenizer": self._tokenizer,
            "tokens": sum(shard["tokens"] for shard in self._shards),
            "shards": self._shards,
        }
        write_json_with_checksum(self._folder / MANIFEST, manifest)

    @property
    def _count_in_block(self) -> int:
        return self._count % self._block_tokens

    def _start_shard(self) -> None:
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

    def _finish_shard(self) -> None:
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
    """A stream of tokens with random access; `len` is its number of tokens. Made by `open`; can be pickled."""

    def __init__(self, folder: Path, shards: list["_Shard"]) -> None:
        self._folder = folder
        self._shards = shards
        self._ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
        self._open_files: dict[int, PositionalFile] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open_files": {}}  # each process opens the files itself

    @classmethod
    def open(cls, folder: Path, tokenizer_fingerprint: str, vocab_size: int) -> "TokenStream":
        """Open a folder of shards: reads only the headers, in time proportional to the number of files.

        Args:
            folder: Of the shards.
            tokenizer_fingerprint: Of the tokenizer that the run uses.
            vocab_size: Ids must be below it.

        Raises:
            PreparedDataError: The folder is incomplete, damaged, of another version or another tokenizer.
        """
        try:
            manifest = read_json_with_checksum(folder / MANIFEST)
        except FileNotFoundError as error:
            raise PreparedDataError(f"{folder} holds no prepared tokens: it has no {MANIFEST}") from error
        except ChecksumError as error:
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
        """Return a copy of the tokens start, ..., start + length - 1, as uint16 [length].

        Raises:
            IndexError: They are not all within the stream.
            PreparedDataError: Checksum mismatch of a block that holds some of them, or a file that cannot be read.
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

    def _file(self, number: int) -> PositionalFile:
        """Return the file of a shard, opened when it is first read; of too many, the one opened first is closed."""
        if number not in self._open_files:
            if len(self._open_files) == MAX_OPEN_FILES:
                del self._open_files[next(iter(self._open_files))]
            self._open_files[number] = self._shards[number].open()
        return self._open_files[number]


class _Shard:
    """One file, with a flag per block that is verified."""

    def __init__(self, path: Path, tokens: int, block_tokens: int, checksums: list[int]) -> None:
        self.path = path
        self.tokens = tokens
        self._block_tokens = block_tokens
        self._checksums = checksums
        self._verified = np.zeros(len(checksums), dtype=np.bool_)

    def open(self) -> PositionalFile:
        """Open the file. Raises PreparedDataError."""
        try:
            return PositionalFile(self.path)
        except OSError as error:
            raise damaged(self.path, f"it cannot be read ({error.strerror})") from error

    def read(self, file: PositionalFile, start: int, length: int) -> Tokens:
        """Return tokens of the opened file, their blocks verified."""
        for block in range(start // self._block_tokens, (start + length - 1) // self._block_tokens + 1):
            if not self._verified[block]:
                self._verify(file, block)
        return np.frombuffer(self._content(file, start, length), TOKEN_TYPE)

    def _verify(self, file: PositionalFile, block: int) -> None:
        start = block * self._block_tokens
        content = self._content(file, start, min(self._block_tokens, self.tokens - start))
        if zlib.crc32(content) != self._checksums[block]:
            raise damaged(self.path, f"checksum mismatch in block {block} (at token {start:,})")
        self._verified[block] = True

    def _content(self, file: PositionalFile, start: int, length: int) -> bytes:
        """Return the bytes of tokens."""
        size = length * TOKEN_TYPE.itemsize
        try:
            content = file.read(HEADER_BYTES + start * TOKEN_TYPE.itemsize, size)
        except OSError as error:
            raise damaged(self.path, f"it cannot be read ({error.strerror})") from error
        if len(content) < size:
            raise damaged(self.path, "it is truncated")
        return content


def _open_shard(folder: Path, entry: dict[str, Any], vocab_size: int) -> _Shard:
    """Check the file that a manifest entry describes, and return it."""
    path = folder / entry["name"]
    if path.parent != folder:  # a manifest from elsewhere may name any file of this machine
        raise PreparedDataError(f"{folder / MANIFEST} names a file of another folder, {entry['name']}")
    expected = HEADER_BYTES + entry["tokens"] * TOKEN_TYPE.itemsize
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = file.read(HEADER_BYTES)
    except OSError as error:
        raise damaged(path, f"it cannot be read ({error.strerror})") from error
    if size != expected:
        raise damaged(path, f"it has {number_of(size, 'byte')} instead of {expected:,}")
    if zlib.crc32(header) != entry["header_crc32"] or (described := _parsed_header(header)) is None:
        raise damaged(path, "checksum mismatch in its header")
    if described["max_id"] >= vocab_size:
        raise PreparedDataError(
            f"{path} holds the id {described['max_id']:,}; the vocabulary has {number_of(vocab_size, 'entry')}. "
            + start_again(folder)
        )
    return _Shard(path, described["tokens"], described["block_tokens"], described["block_crc32"])


def _header(described: dict[str, Any]) -> bytes:
    """Return a header of HEADER_BYTES: MAGIC and the checksum of the rest on one line, then JSON and spaces."""
    content = json.dumps(described).encode()
    first_line = len(MAGIC) + 9
    content = content.ljust(HEADER_BYTES - first_line - 1) + b"\n"
    return MAGIC + b"%08x\n" % zlib.crc32(content) + content


def _parsed_header(header: bytes) -> dict[str, Any] | None:
    """Return the JSON of a header, or None if it is damaged."""
    first_line, _, content = header.partition(b"\n")
    if first_line != MAGIC + b"%08x" % zlib.crc32(content):
        return None
    described: dict[str, Any] = json.loads(content)
    return described
