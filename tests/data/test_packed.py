"""Documents: windows of a token stream, batches of them, the tokenizer's share of each source, and what is left out."""

import gzip
import json
import random
from pathlib import Path

import pytest
import torch

from cucafera.config.errors import UserError
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data import packed
from cucafera.data.packed import StreamWindows, open_documents
from cucafera.data.sample import TextSample, shares_by_weight
from cucafera.data.sources import is_held_out
from cucafera.data.tokenizer import Tokenizer
from cucafera.data.windows import batch_of_windows
from tests.support import Stream

START = DOCUMENT_START_ID


def test_targets_are_the_next_tokens_and_documents_are_numbered_from_their_start_tokens():
    windows = StreamWindows(Stream([7, 8, START, 9, 10, START, 11, 12]), 6)
    assert len(windows) == 1
    window = windows.window(0)
    assert window.input_ids.tolist() == [7, 8, START, 9, 10, START]
    assert window.targets.tolist() == [8, START, 9, 10, START, 11]
    assert window.documents.tolist() == [0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize(("tokens", "windows"), [(0, 0), (1, 0), (6, 0), (7, 1), (12, 1), (13, 2), (14, 2)])
def test_a_window_is_used_as_soon_as_its_last_target_is_there(tokens, windows):
    found = StreamWindows(Stream(list(range(tokens))), 6)
    assert len(found) == windows
    assert [token for number in range(windows) for token in found.window(number).targets] == list(
        range(1, 6 * windows + 1)
    )


def test_a_word_that_only_held_out_documents_have_is_no_token(small_run, corpus):
    words = {False: "tramuntana", True: "xaloc"}
    texts = [f"{word} " * 40 + str(number) for number in range(60) for word in words.values()]
    kept = [text for text in texts if words[is_held_out(text, 0.2)] in text]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in kept))
    tokens = open_documents(small_run()).tokenizer.tokens
    assert "Ġtramuntana" in tokens
    assert not any("xal" in token for token in tokens)


def test_each_window_begins_with_the_last_target_of_the_one_before():
    windows = StreamWindows(Stream(list(range(10, 65_536, 3))), 128)
    for number in range(len(windows) - 1):
        assert windows.window(number).targets[-1] == windows.window(number + 1).input_ids[0]


def test_a_batch_holds_windows_side_by_side_and_splits_into_parts_that_hold_each_once():
    windows = StreamWindows(Stream([START, *range(10, 40)]), 6)
    batch = batch_of_windows([windows.window(number) for number in range(5)], document_masking=True)
    assert batch.input_ids.shape == batch.targets.shape == batch.documents.shape == (5, 6)
    assert batch.input_ids.dtype == batch.targets.dtype == batch.documents.dtype == torch.int32
    parts = list(batch.split(2))
    assert [len(part.input_ids) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
    assert batch_of_windows([windows.window(0)], document_masking=False).documents is None


ENGLISH = "thirteen windows with three shutters were sold yesterday because they should have lived there".split()
CATALAN = "l'església dels tres germans que s'havien barallat força abans d'aquell capvespre plujós d'hivern".split()


def sentences(words: list[str], count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(words, k=60)) for _ in range(count)]


def write(path: Path, documents: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def tokenizer_of(small_run, *overrides: str) -> Tokenizer:
    return packed.open_documents(small_run("model.vocab_size=500", "data.validation_windows=1", *overrides)).tokenizer


def bytes_per_token(tokenizer: Tokenizer, words: list[str]) -> float:
    text = " ".join(words)
    return len(text.encode()) / len(tokenizer.encode(text))


class TestTokenizerTraining:
    @pytest.mark.parametrize("layout", ["two files", "one file", "one file, compressed", "one document"])
    def test_a_part_of_the_text_is_taken_from_all_over_it(self, small_run, tmp_path, layout):
        english, catalan = sentences(ENGLISH, 400), sentences(CATALAN, 400, seed=1)
        match layout:
            case "two files":
                write(tmp_path / "texts" / "a_en.jsonl", english)
                write(tmp_path / "texts" / "z_ca.jsonl", catalan)
            case "one document":
                write(tmp_path / "texts" / "a.jsonl", [" ".join(english + catalan), *english[:9], *catalan[:9]])
            case _:
                write(tmp_path / "texts" / f"a.jsonl{'.gz' * ('compressed' in layout)}", english + catalan)
        overrides = [f"data.sources.files.path={tmp_path}/texts", "tokenizer.train_bytes=60_000"]
        tokenizer = tokenizer_of(small_run, "data.validation_fraction=0.1", *overrides)
        assert bytes_per_token(tokenizer, ENGLISH) > 3
        assert bytes_per_token(tokenizer, CATALAN) > 3

    def test_a_large_first_source_with_a_small_weight_leaves_room_for_the_others(self, small_run, tmp_path):
        write(tmp_path / "en.jsonl", sentences(ENGLISH, 800))
        write(tmp_path / "ca.jsonl", sentences(CATALAN, 100))
        tokenizer = tokenizer_of(
            small_run,
            f"data.sources.files.path={tmp_path}/en.jsonl",
            "data.sources.files.weight=0.1",
            f"+data.sources.more.path={tmp_path}/ca.jsonl",
            "tokenizer.train_bytes=30_000",
        )
        assert bytes_per_token(tokenizer, CATALAN) > 3

    def test_a_budget_larger_than_the_text_takes_all_that_is_not_held_out(self, small_run, tmp_path):
        documents = sentences(ENGLISH, 100)
        held_out = [text for text in documents if is_held_out(text, 0.1)]
        documents += [f"{text} wwxxkk wwxxkk wwxxkk" for text in held_out]
        documents = [text for text in documents if "wwxx" not in text or is_held_out(text, 0.1)]
        marked = ["wwxxkk " * 20 + str(number) for number in range(3000)]
        documents += [text for text in marked if is_held_out(text, 0.1)]
        write(tmp_path / "texts.jsonl", documents)
        overrides = ("data.validation_fraction=0.1", f"data.sources.files.path={tmp_path}/texts.jsonl")
        tokenizer = tokenizer_of(small_run, *overrides)
        assert b"wwxx" not in b"".join(map(tokenizer.bytes_of, range(tokenizer.vocab_size)))
        expected = [text for text in documents if not is_held_out(text, 0.1)]
        assert tokenizer.fingerprint == Tokenizer.train(expected, 500).fingerprint

    def test_a_sample_holds_its_size_of_text_in_its_order_and_each_part_as_often(self):
        times = dict.fromkeys(range(0, 100, 10), 0)
        for seed in range(30):
            sample = TextSample(2000)
            for number in range(100 * seed, 100 * seed + 100):
                sample.add(f"{number:6} " + "x" * 93)
            texts = list(sample.texts())
            assert sample.size == sum(map(len, texts)) == 2000 and texts == sorted(texts)
            for text in texts:
                times[int(text[:6]) % 100 // 10 * 10] += 1
            sample.limit(650)
            assert sample.size == 700 and set(sample.texts()) < set(texts)
        assert sum(times.values()) == 600

    @pytest.mark.parametrize(
        ("total", "weights", "sizes", "shares"),
        [
            (100, [1, 1], [1000, 1000], [50, 50]),
            (100, [1, 3], [1000, 1000], [25, 75]),
            (100, [0.01, 1], [1000, 20], [80, 20]),
            (100, [1, 1, 2], [10, 1000, 1000], [10, 30, 60]),
            (100, [1, 1], [10, 20], [10, 20]),
            (100, [1, 1], [0, 20], [0, 20]),
        ],
    )
    def test_shares_go_by_weight_and_what_one_lacks_goes_to_the_others(self, total, weights, sizes, shares):
        found = dict(shares_by_weight(total, dict(enumerate(weights)), dict(enumerate(sizes))))
        assert [found[number] for number in range(len(shares))] == pytest.approx(shares)

    def test_of_a_source_that_is_streamed_only_a_part_is_read(self, small_run, corpus, monkeypatch):
        from cucafera.data.sources.files import FilesSource

        read = []
        original = FilesSource.rows

        def rows(self, columns=None):
            for row in original(self, columns):
                read.append(1)
                yield row

        monkeypatch.setattr(FilesSource, "rows", rows)
        monkeypatch.setattr(FilesSource, "is_streamed", True)
        monkeypatch.setattr("cucafera.data.tokenize.BATCH_BYTES", 1000)
        config = small_run("tokenizer.train_bytes=400")
        sample = packed._tokenizer_samples(config)["files"]
        assert 0 < len(read) < 40 and sample.size >= 400


class TestLeftOut:
    @pytest.fixture
    def config(self, small_run, tmp_path):
        rows = [json.dumps({"text": text}) for text in sentences(CATALAN, 60)]
        rows[2:2] = ['{"body": "la mar"}'] * 20
        rows += ['{"text": ""}', '{"text": null}', json.dumps({"text": "m" * 20_000})]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows))
        return small_run(f"data.sources.files.path={tmp_path}/rows.jsonl", "data.skip_broken_lines=true")

    def test_what_is_left_out_is_counted_also_when_prepared_data_is_found_again(self, config, tmp_path, monkeypatch):
        first = open_documents(config).left_out
        monkeypatch.setattr("cucafera.data.tokenize._write_shards", lambda *arguments: pytest.fail())
        assert open_documents(config).left_out == first
        broken, empty, cut = map(str, first)
        assert broken.startswith(
            f"files: 20 of 83 (24.1%) rows could not be read: left out; the first: {tmp_path}/rows.jsonl:3: no column"
        )
        assert empty == "files: 2 of 83 (2.4%) documents are empty: left out"
        assert cut.startswith("files: 1 of 61 (1.6%) documents with over 16,384 letters")
        assert [entry.is_large for entry in first] == [True, True, True]

    def test_a_message_about_too_little_text_says_what_was_left_out(self, config):
        config.sequence_length = 100_000
        with pytest.raises(UserError, match=r"smaller sequence_length \(files: 20 of 83 \(24\.1%\) rows could not"):
            open_documents(config)
