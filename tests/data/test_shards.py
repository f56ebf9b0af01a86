import json
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from cucafera.data import shards
from cucafera.data.prepared import PreparedDataError
from cucafera.data.shards import HEADER_BYTES, MANIFEST, VERSION, ShardWriter, TokenStream
from cucafera.storage import read_json_with_checksum, write_json_with_checksum


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 64 tokens."""
    monkeypatch.setattr(shards, "BLOCK_TOKENS", 64)


def write_stream(folder: Path, tokens: np.ndarray, shard_tokens: int = 500, step: int = 37) -> None:
    writer = ShardWriter(folder, "print", shard_tokens)
    for first in range(0, len(tokens), step):
        writer.append(tokens[first : first + step])
    writer.close()


def random_tokens(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 65_536, count, dtype=np.uint16)


def open_stream(folder: Path, vocab_size: int = 65_536) -> TokenStream:
    return TokenStream.open(folder, "print", vocab_size)


def refusal(folder: Path, **settings: int) -> str:
    with pytest.raises(PreparedDataError) as caught:
        open_stream(folder, **settings)
    return str(caught.value)


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


class TestFormat:
    @pytest.mark.parametrize("step", [1, 37, 64, 500, 501, 5000])
    def test_what_is_appended_is_read_back_however_it_is_cut(self, tmp_path, small_blocks, step):
        tokens = random_tokens(2345)
        write_stream(tmp_path / "s", tokens, step=step)
        stream = open_stream(tmp_path / "s")
        assert len(stream) == 2345
        assert len(list((tmp_path / "s").glob("*.shard"))) == 5
        for start, length in ((0, 2345), (0, 1), (499, 2), (1000, 0), (2344, 1), (2345, 0), (63, 1400)):
            part = stream.read(start, length)
            assert part.dtype == np.uint16
            assert np.array_equal(part, tokens[start : start + length])

    def test_how_it_is_appended_does_not_change_the_files(self, tmp_path, small_blocks):
        tokens = random_tokens(1200)
        write_stream(tmp_path / "a", tokens, step=1)
        write_stream(tmp_path / "b", tokens, step=999)
        assert contents(tmp_path / "a") == contents(tmp_path / "b")

    def test_a_shard_is_on_disk_before_it_gets_its_name_and_the_manifest_comes_last(self, tmp_path, disk_calls):
        write_stream(tmp_path / "s", random_tokens(1200))
        assert disk_calls == [
            *(f"{call}" for number in range(3) for call in (f"fsync {number:05}.partial",
                                                            f"rename {number:05}.partial {number:05}.shard")),
            "fsync shards.json.partial", "rename shards.json.partial shards.json", "fsync s",
        ]  # fmt: skip
        sizes = [disk_calls.synced[f"{number:05}.partial"] for number in range(3)]
        assert sizes == [file.stat().st_size for file in sorted((tmp_path / "s").glob("*.shard"))]

    def test_a_shard_knows_its_largest_id_wherever_it_stands(self, tmp_path, small_blocks):
        tokens = np.full(1200, 7, dtype=np.uint16)
        tokens[510] = 900
        write_stream(tmp_path / "s", tokens)
        assert len(open_stream(tmp_path / "s", vocab_size=901)) == 1200
        assert "holds the id 900; the vocabulary has 900 entries" in refusal(tmp_path / "s", vocab_size=900)

    @pytest.mark.parametrize(("start", "length"), [(-1, 5), (1, 100), (100, 1), (5, -1)])
    def test_reading_outside_the_stream_is_an_error(self, tmp_path, start, length):
        write_stream(tmp_path / "s", random_tokens(100))
        with pytest.raises(IndexError):
            open_stream(tmp_path / "s").read(start, length)

    def test_a_stream_without_tokens_is_a_stream(self, tmp_path):
        write_stream(tmp_path / "s", random_tokens(0))
        stream = open_stream(tmp_path / "s")
        assert len(stream) == 0 and stream.read(0, 0).size == 0

    def test_a_header_can_be_read_by_people(self, tmp_path):
        write_stream(tmp_path / "s", np.arange(100, dtype=np.uint16))
        first, second, *_ = (tmp_path / "s" / "00000.shard").read_bytes()[:HEADER_BYTES].decode().split("\n")
        assert first.startswith("cucafera shard")
        described = json.loads(second)
        assert (described["version"], described["tokens"], described["max_id"]) == (VERSION, 100, 99)
        assert described["tokenizer"] == "print"
        content = (tmp_path / "s" / "00000.shard").read_bytes()[HEADER_BYTES:]
        assert np.array_equal(np.frombuffer(content, "<u2"), np.arange(100))

    def test_the_checksums_of_the_largest_shard_fit_its_header(self, tmp_path):
        writer = ShardWriter(tmp_path / "s", "f" * 64, 1_000_000_000)
        blocks = -(-1_000_000_000 // writer._block_tokens)
        header = shards._header({"tokenizer": "f" * 64, "block_crc32": [2**32 - 1] * blocks, "more": "x" * 300})
        assert len(header) == HEADER_BYTES

    def test_a_stream_can_be_pickled_and_reads_on(self, tmp_path):
        tokens = random_tokens(1000)
        write_stream(tmp_path / "s", tokens)
        stream = open_stream(tmp_path / "s")
        stream.read(0, 1000)
        content = pickle.dumps(stream)
        assert len(content) < 2000
        assert np.array_equal(pickle.loads(content).read(400, 200), tokens[400:600])

    def test_opening_and_reading_hold_little_memory(self, tmp_path):
        write_stream(tmp_path / "s", random_tokens(2_000_000), shard_tokens=1_000_000, step=2_000_000)
        tracemalloc.start()
        stream = open_stream(tmp_path / "s")
        for start in range(0, len(stream) - 257, 10_000):
            stream.read(start, 257)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 800_000  # of 4 MB: one block at a time

    def test_more_shards_than_may_be_open_are_read_as_well(self, tmp_path, small_blocks, monkeypatch):
        monkeypatch.setattr(shards, "MAX_OPEN_FILES", 2)
        tokens = random_tokens(2345)
        write_stream(tmp_path / "s", tokens)
        stream = open_stream(tmp_path / "s")
        before = open_files()
        for start in (0, 1900, 700, 0, 1200, 2300):
            assert np.array_equal(stream.read(start, 45), tokens[start : start + 45])
        assert open_files() == before + 2
        del stream
        assert open_files() == before

    def test_what_comes_in_pieces_is_put_together(self, tmp_path, monkeypatch):
        tokens = random_tokens(2000)
        write_stream(tmp_path / "s", tokens)
        pread = os.pread
        monkeypatch.setattr(os, "pread", lambda file, size, position: pread(file, min(size, 333), position))
        assert np.array_equal(open_stream(tmp_path / "s").read(0, 2000), tokens)


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path, small_blocks) -> Path:
        write_stream(tmp_path / "s", random_tokens(1200))
        return tmp_path / "s"

    def test_without_a_manifest_there_is_nothing(self, tmp_path):
        writer = ShardWriter(tmp_path / "s", "print", 500)
        writer.append(random_tokens(1200))
        assert "holds no prepared tokens" in refusal(tmp_path / "s")
        assert "holds no prepared tokens" in refusal(tmp_path / "nothing")

    def test_a_file_cut_short_is_named_with_its_sizes(self, folder):
        path = folder / "00001.shard"
        path.write_bytes(path.read_bytes()[:-100])
        message = refusal(folder)
        assert f"{path} is damaged: it has 17,284 bytes instead of 17,384. Delete the folder {folder}" in message

    def test_a_file_that_is_cut_short_or_lost_while_it_is_in_use_is_named(self, folder):
        stream = open_stream(folder)
        os.truncate(folder / "00001.shard", HEADER_BYTES + 100)
        (folder / "00002.shard").unlink()
        with pytest.raises(match=r"00001\.shard is damaged: it is truncated"):
            stream.read(500, 10)
        with pytest.raises(match=r"00002\.shard is damaged: it cannot be read \(No such file"):
            stream.read(1000, 10)

    def test_a_missing_file_is_named(self, folder):
        (folder / "00002.shard").unlink()
        assert "00002.shard is damaged: it cannot be read (No such file" in refusal(folder)

    @pytest.mark.parametrize("position", [0, 35, 60, 200, HEADER_BYTES - 1])
    def test_a_flipped_bit_in_a_header_is_found_when_opening(self, folder, position):
        flip_bit(folder / "00001.shard", position)
        assert "00001.shard is damaged: checksum mismatch in its header" in refusal(folder)

    @pytest.mark.parametrize("position", range(0, 200, 7))
    def test_a_flipped_bit_in_the_manifest_is_found_when_opening(self, folder, position):
        flip_bit(folder / "shards.json", position)
        try:
            refusal(folder)
        except pytest.fail.Exception:
            assert json.loads((folder / "shards.json").read_bytes())["tokens"] == 1200  # a changed space is no harm

    @pytest.mark.parametrize("token", [0, 63, 64, 130, 499])
    def test_a_flipped_bit_is_found_before_any_token_of_its_block_is_used(self, folder, token):
        flip_bit(folder / "00001.shard", HEADER_BYTES + 2 * token)
        stream = open_stream(folder)
        block = token // 64
        with pytest.raises(match=rf"00001\.shard is damaged: checksum mismatch in block {block} "):
            stream.read(500 + 64 * block, 1)
        with pytest.raises(PreparedDataError):
            stream.read(0, 1200)
        assert stream.read(0, 500).size == 500

    def test_shards_of_another_tokenizer_are_refused(self, folder):
        with pytest.raises(match="fingerprint is print, that of the tokenizer in use other"):
            TokenStream.open(folder, "other", 65_536)

    def test_ids_beyond_the_vocabulary_are_refused_when_opening(self, folder):
        assert "the vocabulary has 1,000 entries" in refusal(folder, vocab_size=1000)

    def test_another_version_is_refused(self, folder, monkeypatch):
        monkeypatch.setattr(shards, "VERSION", 2)
        assert "format version 1, and this program reads 2" in refusal(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_manifest_cannot_name_a_file_outside_its_folder(tmp_path):
    write_stream(tmp_path / "stream", np.arange(100, dtype=np.uint16))
    manifest = read_json_with_checksum(tmp_path / "stream" / MANIFEST)
    for name in ("../elsewhere.shard", str(tmp_path / "elsewhere.shard"), "below/elsewhere.shard"):
        (tmp_path / "elsewhere.shard").write_bytes((tmp_path / "stream" / "00000.shard").read_bytes())
        manifest["shards"][0]["name"] = name
        write_json_with_checksum(tmp_path / "stream" / MANIFEST, manifest)
        assert "names a file of another folder" in refusal(tmp_path / "stream")
