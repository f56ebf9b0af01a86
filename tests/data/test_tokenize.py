"""From text to shards."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cucafera.config.errors import UserError
from cucafera.config.schema import DataConfig
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data import tokenize
from cucafera.data.shards import ShardWriter, TokenStream
from cucafera.data.sources import is_held_out
from cucafera.data.sources.files import FilesConfig
from cucafera.data.split import Split
from cucafera.data.tokenize import TokenizedSource, tokenize_source
from cucafera.data.tokenizer import CUT, Tokenizer


def prepare(path: Path, tokenizer: Tokenizer, folder: Path, **settings: object) -> TokenizedSource:
    data = DataConfig(**{"validation_fraction": 0.1, "shard_tokens": 5000, "processes": 1} | settings)
    return tokenize_source("web", FilesConfig(path=str(path)), tokenizer, data, folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_documents_are_held_out_by_their_text_alone():
    documents = [f"document {number}" for number in range(4000)]
    held_out = {text for text in documents if is_held_out(text, 0.1)}
    assert 320 < len(held_out) < 480
    assert held_out > {text for text in documents if is_held_out(text, 0.05)}
    assert is_held_out("document 0", 1.0) and not is_held_out("document 0", 0.0)


def test_a_document_is_on_the_same_side_in_every_version_of_this_package():
    texts = ["la mar", "el sol", "Bon dia!", "cançons d'hivern", "€", "document 7", "document 8", "x" * 1000]
    smallest = [next(f for f in range(101) if is_held_out(text, f / 100)) for text in texts]
    assert smallest == [95, 9, 42, 43, 53, 59, 79, 10]  # the percentage from which each is held out


class TestTokenizeSource:
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
        assert summary == TokenizedSource(
            tokenizer=tokenizer.fingerprint,
            documents=2,
            tokens=tokens + 2,
            text_bytes=17,
            empty_documents=2,
            broken_lines=1,
            first_broken=f"{path}:4: the text is a int, not a string",
        )

    def test_documents_with_text_too_long_for_the_tokenizer_are_counted(self, write_jsonl, tokenizer, tmp_path):
        path = write_jsonl("a.jsonl", ["la mar", "x" * 100_000, "el bosc " + "1" * 20_000, "y" * 10_000])
        summary = prepare(path, tokenizer, tmp_path / "p", validation_fraction=0.5)
        assert (summary.cut_documents, summary.documents + summary.held_out_documents) == (2, 4)
        (left_out,) = summary.left_out("web")
        assert str(left_out) == f"web: 2 of 4 (50.0%) documents {CUT}"

    def test_a_corpus_without_held_out_documents_says_so_in_the_summary(self, write_jsonl, tokenizer, tmp_path):
        path = write_jsonl("a.jsonl", ["la mar", "el bosc"])
        summary = prepare(path, tokenizer, tmp_path / "p", validation_fraction=1e-9)
        assert (summary.held_out_documents, summary.held_out_tokens) == (0, 0)
        assert len(TokenStream.open(tmp_path / "p" / "validation", tokenizer.fingerprint, 300)) == 0

    def test_a_document_longer_than_a_shard_is_complete(self, write_jsonl, tokenizer, tmp_path):
        text = "la mar " * 3000
        prepare(write_jsonl("a.jsonl", [text]), tokenizer, tmp_path / "p", validation_fraction=1e-9, shard_tokens=1024)
        stream = TokenStream.open(tmp_path / "p" / "train", tokenizer.fingerprint, 300)
        assert tokenizer.decode(stream.read(1, len(stream) - 1)) == text

    def test_what_is_prepared_is_not_prepared_again(self, corpus, tokenizer, tmp_path, monkeypatch):
        first = prepare(corpus, tokenizer, tmp_path / "p")
        monkeypatch.setattr(tokenize, "_write_shards", lambda *arguments: pytest.fail())
        assert prepare(corpus, tokenizer, tmp_path / "p") == first

    def test_a_corpus_without_documents_is_refused(self, write_jsonl, tokenizer, tmp_path):
        path = write_jsonl("a.jsonl", ["", {"text": 3}])
        with pytest.raises(UserError, match=r"web holds no document: 1 were empty, 1 could not be read.*a\.jsonl:2"):
            prepare(path, tokenizer, tmp_path / "p", skip_broken_lines=True)
        assert names(tmp_path) == ["a.jsonl", "p.lock"]

    def test_a_broken_line_leaves_no_files(self, write_jsonl, tokenizer, tmp_path):
        with pytest.raises(UserError, match=r"a\.jsonl:2"):
            prepare(write_jsonl("a.jsonl", ["mar", ["list"]]), tokenizer, tmp_path / "p")
        assert names(tmp_path) == ["a.jsonl", "p.lock"]

    @pytest.mark.parametrize("method", ["_write", "_finish_shard", "close"])
    def test_a_full_disk_is_named_and_leaves_no_files(self, corpus, tokenizer, tmp_path, monkeypatch, method):
        def full(*args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(ShardWriter, method, full)
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
        with pytest.raises(match=r"has no prepared\.json"):
            prepare(corpus, tokenizer, tmp_path / "p")
        assert (tmp_path / "p" / "mine").exists()

    def test_progress_is_a_line_where_there_is_no_terminal(self, corpus, tokenizer, tmp_path, capsys):
        prepare(corpus, tokenizer, tmp_path / "p")
        assert capsys.readouterr().err.count("Tokenizing web: ") == 1

    def test_the_second_of_two_programs_waits_for_the_first(self, corpus, tokenizer, tmp_path, monkeypatch):
        original, calls = tokenize._write_shards, []

        def slow(*args):
            calls.append(1)
            time.sleep(0.3)
            original(*args)

        monkeypatch.setattr(tokenize, "_write_shards", slow)
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
        monkeypatch.setattr(tokenize, "BATCH_BYTES", 2000)  # so that a few kilobytes are many batches
        return write_jsonl("web.jsonl", make_documents(300))

    def test_the_number_of_processes_does_not_change_the_files(self, corpus, tokenizer, tmp_path):
        alone = prepare(corpus, tokenizer, tmp_path / "alone", processes=1)
        assert prepare(corpus, tokenizer, tmp_path / "two", processes=2) == alone
        assert contents(tmp_path / "two") == contents(tmp_path / "alone")

    @pytest.mark.parametrize(("characters", "most"), [(500, 4), (5000, 2)])
    def test_long_documents_are_few_at_a_time(self, write_jsonl, tokenizer, tmp_path, monkeypatch, characters, most):
        original, in_flight = tokenize._encode, []

        class Pool:
            def __init__(self, *arguments: object) -> None:
                pass

            def submit(self, function, batch):
                in_flight.append(1)
                return SimpleNamespace(result=lambda: (in_flight.pop(), original(tokenizer, Split(0.1), batch))[1])

            def shutdown(self, **settings: object) -> None:
                pass

        monkeypatch.setattr(tokenize, "ProcessPoolExecutor", Pool)
        monkeypatch.setattr(tokenize, "BATCH_BYTES", 500)
        counts = []
        append = ShardWriter.append
        monkeypatch.setattr(ShardWriter, "append", lambda *args: (counts.append(len(in_flight)), append(*args)))
        prepare(write_jsonl("a.jsonl", ["m" * characters] * 20), tokenizer, tmp_path / "p", processes=2)
        assert max(counts) == most

    def test_a_small_corpus_starts_no_process(self, write_jsonl, tokenizer, tmp_path, monkeypatch):
        monkeypatch.setattr(tokenize, "ProcessPoolExecutor", None)
        assert prepare(write_jsonl("a.jsonl", ["la mar"]), tokenizer, tmp_path / "p", processes=2).documents == 1

    def test_a_killed_worker_is_reported(self, corpus, tokenizer, tmp_path, monkeypatch):
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
from cucafera.config.schema import DataConfig
from cucafera.data import tokenize
from cucafera.data.shards import ShardWriter
from cucafera.data.sources import is_held_out
from cucafera.data.sources.files import FilesConfig
from cucafera.data.tokenizer import Tokenizer

if __name__ == "__main__":
    tokenize.BATCH_BYTES = 2000
    append = ShardWriter.append

    def slow(self, tokens):
        append(self, tokens)
        print("appended", flush=True)
        sys.stdin.readline()

    ShardWriter.append = slow
    data = DataConfig(validation_fraction=0.1, shard_tokens=5000, processes=int(sys.argv[4]))
    tokenizer = Tokenizer.load(sys.argv[2])
    tokenize.tokenize_source("web", FilesConfig(path=sys.argv[1]), tokenizer, data, Path(sys.argv[3]))
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
        env=os.environ | {"PYTHONPATH": str(Path(tokenize.__file__).parents[2])},
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

    monkeypatch.setattr(tokenize, "BATCH_BYTES", 2000)
    prepare(corpus, tokenizer, tmp_path / "p")
    prepare(corpus, tokenizer, tmp_path / "undisturbed")
    assert contents(tmp_path / "p") == contents(tmp_path / "undisturbed")
    assert not (tmp_path / "p.partial").exists()


def ended(process: str) -> bool:
    """True if a process ends within ten seconds."""
    for _ in range(100):
        state = Path(f"/proc/{process}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False
