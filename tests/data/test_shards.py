import errno
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from cucafera.config import SourceConfig, UserError
from cucafera.data import shards
from cucafera.data.corpus import is_held_out
from cucafera.data.files import read_sealed, write_sealed
from cucafera.data.prepared import PreparedDataError
from cucafera.data.shards import (
    HEADER_BYTES,
    MANIFEST,
    VERSION,
    PreparedSource,
    ShardWriter,
    TokenStream,
    prepare_source,
)
from cucafera.data.tokenizer import DOCUMENT_START_ID, Tokenizer


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
        monkeypatch.setattr(shards, "MOST_OPEN_FILES", 2)
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
        whole = os.pread
        monkeypatch.setattr(os, "pread", lambda file, size, position: whole(file, min(size, 333), position))
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
        with pytest.raises(match=r"00001\.shard is damaged: it has been cut short"):
            stream.read(500, 10)
        with pytest.raises(match=r"00002\.shard is damaged: it cannot be read \(No such file"):
            stream.read(1000, 10)

    def test_a_missing_file_is_named(self, folder):
        (folder / "00002.shard").unlink()
        assert "00002.shard is damaged: it cannot be read (No such file" in refusal(folder)

    @pytest.mark.parametrize("position", [0, 35, 60, 200, HEADER_BYTES - 1])
    def test_a_flipped_bit_in_a_header_is_found_when_opening(self, folder, position):
        flip_bit(folder / "00001.shard", position)
        assert "00001.shard is damaged: its header" in refusal(folder)

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
        with pytest.raises(match=rf"00001\.shard is damaged: block {block} "):
            stream.read(500 + 64 * block, 1)
        with pytest.raises(PreparedDataError):
            stream.read(0, 1200)
        assert stream.read(0, 500).size == 500

    def test_shards_of_another_tokenizer_are_refused(self, folder):
        with pytest.raises(match="fingerprint is print, that of the tokenizer in use other"):
            TokenStream.open(folder, "other", 65_536)

    def test_ids_behind_the_vocabulary_are_refused_when_opening(self, folder):
        assert "the vocabulary has 1,000 entries" in refusal(folder, vocab_size=1000)

    def test_another_version_is_refused(self, folder, monkeypatch):
        monkeypatch.setattr(shards, "VERSION", 2)
        assert "format version 1, and this program reads 2" in refusal(folder)


def prepare(path: Path, tokenizer: Tokenizer, folder: Path, **settings: object) -> PreparedSource:
    given = {"validation_fraction": 0.1, "shard_tokens": 5000, "skip_broken_lines": False, "processes": 1} | settings
    return prepare_source("web", SourceConfig(path=str(path)), tokenizer, folder, **given)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestPrepare:
    @pytest.fixture
    def corpus(self, write_jsonl, make_documents) -> Path:
        return write_jsonl("web.jsonl", make_documents(300))

    def test_the_streams_are_the_documents_each_after_its_start_token(
        self, corpus, tokenizer, tmp_path, make_documents
    ):
        summary = prepare(corpus, tokenizer, tmp_path / "p" / "web")
        for name, held_out in (("train", False), ("validation", True)):
            stream = TokenStream.open(tmp_path / "p" / "web" / name, tokenizer.fingerprint, tokenizer.vocab_size)
            expected = [text for text in make_documents(300) if is_held_out(text, 0.1) == held_out]
            tokens = stream.read(0, len(stream))
            starts = np.flatnonzero(tokens == DOCUMENT_START_ID)
            texts = [tokenizer.decode(part[1:]) for part in np.split(tokens, starts[1:])]
            assert texts == expected
            assert len(expected) == (summary.held_out_documents if held_out else summary.documents)
            assert len(stream) == (summary.held_out_tokens if held_out else summary.tokens)
        assert len(list((tmp_path / "p" / "web" / "train").glob("*.shard"))) > 1
        assert names(tmp_path / "p") == ["web", "web.lock"]

    def test_the_summary_counts_everything(self, write_jsonl, tokenizer, tmp_path):
        path = write_jsonl("a.jsonl", ["la mar és", "", {"text": None}, {"text": 3}, "el bosc"])
        summary = prepare(path, tokenizer, tmp_path / "p", validation_fraction=1e-9, skip_broken_lines=True)
        tokens = len(tokenizer.encode("la mar és")) + len(tokenizer.encode("el bosc"))
        assert summary == PreparedSource(
            tokenizer=tokenizer.fingerprint,
            documents=2,
            tokens=tokens + 2,
            text_bytes=17,
            empty_documents=2,
            broken_lines=1,
            bytes_per_token=17 / tokens,
        )

    def test_a_corpus_without_held_out_documents_says_so_in_the_summary(self, write_jsonl, tokenizer, tmp_path):
        path = write_jsonl("a.jsonl", ["la mar", "el bosc"])
        summary = prepare(path, tokenizer, tmp_path / "p", validation_fraction=1e-9)
        assert (summary.held_out_documents, summary.held_out_tokens) == (0, 0)
        assert len(TokenStream.open(tmp_path / "p" / "validation", tokenizer.fingerprint, 300)) == 0

    def test_a_document_longer_than_a_shard_is_kept_whole(self, write_jsonl, tokenizer, tmp_path):
        text = "la mar " * 3000
        prepare(write_jsonl("a.jsonl", [text]), tokenizer, tmp_path / "p", validation_fraction=1e-9, shard_tokens=1024)
        stream = TokenStream.open(tmp_path / "p" / "train", tokenizer.fingerprint, 300)
        assert tokenizer.decode(stream.read(1, len(stream) - 1)) == text

    def test_what_is_prepared_is_not_prepared_again(self, corpus, tokenizer, tmp_path, monkeypatch):
        first = prepare(corpus, tokenizer, tmp_path / "p")
        monkeypatch.setattr(shards, "_prepare", None)
        assert prepare(corpus, tokenizer, tmp_path / "p") == first

    def test_a_corpus_without_documents_is_refused(self, write_jsonl, tokenizer, tmp_path):
        path = write_jsonl("a.jsonl", ["", {"text": 3}])
        with pytest.raises(UserError, match=r"web holds no document: 1 were empty, 1 could not be read.*a\.jsonl:2"):
            prepare(path, tokenizer, tmp_path / "p", skip_broken_lines=True)
        assert names(tmp_path) == ["a.jsonl", "p.lock"]

    def test_a_broken_line_leaves_nothing_behind(self, write_jsonl, tokenizer, tmp_path):
        with pytest.raises(UserError, match=r"a\.jsonl:2"):
            prepare(write_jsonl("a.jsonl", ["mar", ["list"]]), tokenizer, tmp_path / "p")
        assert names(tmp_path) == ["a.jsonl", "p.lock"]

    @pytest.mark.parametrize("place", ["_write", "_end_shard", "close"])
    def test_a_full_disk_is_named_and_leaves_nothing_behind(self, corpus, tokenizer, tmp_path, monkeypatch, place):
        def full(*args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(ShardWriter, place, full)
        with pytest.raises(match=r"/p: No space left on device; .*data\.prepared_dir"):
            prepare(corpus, tokenizer, tmp_path / "p")
        assert names(tmp_path) == ["p.lock", "web.jsonl"]

    def test_a_folder_that_cannot_be_made_is_named(self, corpus, tokenizer, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(match=r"cannot write prepared tokens to .*data\.prepared_dir"):
            prepare(corpus, tokenizer, tmp_path / "file" / "p")

    def test_a_folder_that_lost_its_summary_is_not_overwritten(self, corpus, tokenizer, tmp_path):
        (tmp_path / "p").mkdir()
        (tmp_path / "p" / "mine").touch()
        with pytest.raises(match="is not whole"):
            prepare(corpus, tokenizer, tmp_path / "p")
        assert (tmp_path / "p" / "mine").exists()

    def test_progress_is_a_line_where_there_is_no_terminal(self, corpus, tokenizer, tmp_path, capsys):
        prepare(corpus, tokenizer, tmp_path / "p")
        assert capsys.readouterr().err.count("Tokenizing web: 0.1 MB of text") == 1

    def test_the_second_of_two_programs_waits_for_the_first(self, corpus, tokenizer, tmp_path, monkeypatch):
        original, calls = shards._prepare, []

        def slow(*args):
            calls.append(1)
            time.sleep(0.3)
            original(*args)

        monkeypatch.setattr(shards, "_prepare", slow)
        results = []
        work = [
            threading.Thread(target=lambda: results.append(prepare(corpus, tokenizer, tmp_path / "p")))
            for _ in range(2)
        ]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        assert len(calls) == 1 and results[0] == results[1]


class TestProcesses:
    @pytest.fixture
    def corpus(self, write_jsonl, make_documents, monkeypatch) -> Path:
        monkeypatch.setattr(shards, "BATCH_BYTES", 2000)  # so that a few kilobytes are many batches
        return write_jsonl("web.jsonl", make_documents(300))

    def test_the_number_of_processes_does_not_change_the_files(self, corpus, tokenizer, tmp_path):
        alone = prepare(corpus, tokenizer, tmp_path / "alone", processes=1)
        assert prepare(corpus, tokenizer, tmp_path / "two", processes=2) == alone
        assert contents(tmp_path / "two") == contents(tmp_path / "alone")

    def test_a_small_corpus_starts_no_process(self, write_jsonl, tokenizer, tmp_path, monkeypatch):
        monkeypatch.setattr(shards, "_encoded_by_processes", None)
        prepare(write_jsonl("a.jsonl", ["la mar"]), tokenizer, tmp_path / "p", processes=2)

    def test_a_process_that_is_killed_is_answered(self, corpus, tokenizer, tmp_path, monkeypatch):
        original = ShardWriter.append

        def kill_workers(self, tokens):
            for worker in multiprocessing.active_children():
                worker.kill()  # unlike os.kill, no error if it has died in the meantime
            original(self, tokens)

        monkeypatch.setattr(ShardWriter, "append", kill_workers)
        with pytest.raises(match=r"was killed.*data\.processes"):
            prepare(corpus, tokenizer, tmp_path / "p", processes=2)
        assert names(tmp_path) == ["p.lock", "web.jsonl"]

    def test_an_error_while_reading_ends_the_processes(self, corpus, tokenizer, tmp_path):
        with corpus.open("a") as file:
            file.write("{\n")
        with pytest.raises(UserError, match=r"web\.jsonl:301"):
            prepare(corpus, tokenizer, tmp_path / "p", processes=2)
        assert multiprocessing.active_children() == []
        assert names(tmp_path) == ["p.lock", "web.jsonl"]


PROGRAM = """
import sys
from pathlib import Path
from cucafera.config import SourceConfig
from cucafera.data import shards
from cucafera.data.tokenizer import Tokenizer

if __name__ == "__main__":
    shards.BATCH_BYTES = 2000
    append = shards.ShardWriter.append

    def slow(self, tokens):
        append(self, tokens)
        print("appended", flush=True)
        sys.stdin.readline()

    shards.ShardWriter.append = slow
    shards.prepare_source("web", SourceConfig(path=sys.argv[1]), Tokenizer.load(sys.argv[2]), Path(sys.argv[3]),
        validation_fraction=0.1, shard_tokens=5000, skip_broken_lines=False, processes=int(sys.argv[4]))
"""


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_was_stopped_and_started_again_equals_one_undisturbed(
    write_jsonl, make_documents, tokenizer, tmp_path, monkeypatch, stop, processes
):
    corpus = write_jsonl("web.jsonl", make_documents(300))
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "program.py").write_text(PROGRAM)
    with subprocess.Popen(
        [sys.executable, "program.py", "web.jsonl", "tokenizer.json", "p", str(processes)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(shards.__file__).parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    ) as program:
        for _ in range(12):
            assert program.stdout.readline() == "appended\n"
            program.stdin.write("\n")
            program.stdin.flush()
        children = Path(f"/proc/{program.pid}/task/{program.pid}/children")
        workers = children.read_text().split() if children.exists() else []
        program.send_signal(stop)
    assert program.returncode != 0
    assert (tmp_path / "p.partial").exists() == (stop == signal.SIGKILL)
    assert not (tmp_path / "p").exists()
    assert all(ended(worker) for worker in workers)

    monkeypatch.setattr(shards, "BATCH_BYTES", 2000)
    prepare(corpus, tokenizer, tmp_path / "p")
    prepare(corpus, tokenizer, tmp_path / "undisturbed")
    assert contents(tmp_path / "p") == contents(tmp_path / "undisturbed")
    assert not (tmp_path / "p.partial").exists()


def ended(process: str) -> bool:
    """Whether a process ends within ten seconds."""
    for _ in range(100):
        state = Path(f"/proc/{process}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_manifest_cannot_name_a_file_outside_its_folder(tmp_path):
    write_stream(tmp_path / "stream", np.arange(100, dtype=np.uint16))
    manifest = read_sealed(tmp_path / "stream" / MANIFEST)
    for name in ("../elsewhere.shard", str(tmp_path / "elsewhere.shard"), "below/elsewhere.shard"):
        (tmp_path / "elsewhere.shard").write_bytes((tmp_path / "stream" / "00000.shard").read_bytes())
        manifest["shards"][0]["name"] = name
        write_sealed(tmp_path / "stream" / MANIFEST, manifest)
        assert "names a file of another folder" in refusal(tmp_path / "stream")
