import gzip
import json
import os
import random
import sys
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import datasets
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from cucafera.config.errors import UserError
from cucafera.config.registry import SOURCES
from cucafera.config.schema import ColumnsConfig, SourceConfig
from cucafera.data import compression
from cucafera.data.sources import ReadCounts, Source, SourceKind, embedded, files, fingerprint_of, open_source
from cucafera.data.sources.embedded import EmbeddedConfig
from cucafera.data.sources.files import FilesConfig
from cucafera.data.sources.hub import HubConfig


def read(source: SourceConfig, skip_broken_rows: bool = False) -> tuple[list[str], ReadCounts]:
    opened = open_source("web", source, skip_broken_rows)
    return [text for text, _ in opened.documents()], opened.counts


def texts_of(source: SourceConfig) -> list[str]:
    return read(source)[0]


def texts_at(path: Path | str, **settings: object) -> list[str]:
    return texts_of(FilesConfig(path=str(path), **settings))


def fingerprint(source: SourceConfig) -> str:
    return open_source("web", source).fingerprint()


def refusal(source: SourceConfig) -> str:
    with pytest.raises(UserError) as caught:
        texts_of(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def packed(content: bytes, suffix: str) -> bytes:
    return {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress, "": bytes}[suffix](
        content
    )


LINES = b'{"text": "la mar\\r\\n"}\n\n{"text": "el bosc", "id": 3}'


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_is_read_plain_and_packed(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed(LINES, suffix))
    assert texts_at(path) == ["la mar\r\n", "el bosc"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_txt_file_is_one_document_with_its_line_ends_kept(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(packed("l'àvia\r\n\r\ncanta\n".encode(), suffix))
    assert texts_at(path) == ["l'àvia\r\n\r\ncanta\n"]


def test_a_separator_divides_a_txt_file_into_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("un\nçç##dos####  \n##tres".encode())
    texts, counts = read(FilesConfig(path=str(path), document_separator="##"))
    assert texts == ["un\nçç", "dos", "tres"]
    assert counts == ReadCounts(documents=3, empty=2)


def test_separators_are_found_across_chunks(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    documents = ["x" * length for length in range(1, 40)]
    path.write_text("<sep>".join(documents))
    for size in (1, 2, 3, 7, 1000):
        monkeypatch.setattr(files, "CHUNK_BYTES", size)
        monkeypatch.setattr(compression, "BUFFER_BYTES", size)
        assert texts_at(path, document_separator="<sep>") == documents


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix):
    content = '{"text": "mar"}' if suffix == ".jsonl" else "mar"
    (tmp_path / f"a{suffix}").write_text(content, encoding="utf-8-sig")
    assert texts_at(tmp_path / f"a{suffix}") == ["mar"]
    assert texts_at(tmp_path / f"a{suffix}", document_separator="##") == ["mar"]


def test_a_zst_file_of_several_frames_is_read_to_its_end(tmp_path):
    lines = [json.dumps({"text": f"document {number}"}).encode() + b"\n" for number in range(2000)]
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(b"".join(lines[first : first + 7])) for first in range(0, 2000, 7)))
    assert texts_at(path) == [f"document {number}" for number in range(2000)]


@pytest.mark.parametrize("rows_in_group", [1, 3, 1000])
@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), "dictionary"])
def test_parquet_is_read_by_row_groups(tmp_path, kind, rows_in_group):
    path = tmp_path / "a.parquet"
    values = ["la mar", None, "", "l'àvia"]
    column = pyarrow.array(values).dictionary_encode() if kind == "dictionary" else pyarrow.array(values, kind)
    table = pyarrow.table({"id": [1, 2, 3, 4], "text": column})
    parquet.write_table(table, path, row_group_size=rows_in_group)
    texts, counts = read(FilesConfig(path=str(path)))
    assert texts == ["la mar", "l'àvia"]
    assert counts.empty == 2


def test_bad_utf8_in_parquet_is_refused_with_its_row(tmp_path):
    path = tmp_path / "a.parquet"
    column = pyarrow.array([b"mar", b"m\xff", b"cel"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), path)
    assert "a.parquet, row 2: not UTF-8 (byte 0xff)" in refusal(FilesConfig(path=str(path)))
    texts, counts = read(FilesConfig(path=str(path)), skip_broken_rows=True)
    assert texts == ["mar", "cel"]
    assert counts.broken == 1


def test_a_parquet_column_of_numbers_is_refused(tmp_path):
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert "a.parquet, row 1: the text is a int, not a string" in refusal(FilesConfig(path=str(tmp_path / "a.parquet")))


def test_a_cut_parquet_file_is_refused(tmp_path):
    buffer = BytesIO()
    parquet.write_table(pyarrow.table({"text": ["mar"] * 100}), buffer)
    (tmp_path / "a.parquet").write_bytes(buffer.getvalue()[:-20])
    assert "a.parquet is damaged or truncated" in refusal(FilesConfig(path=str(tmp_path / "a.parquet")))


def test_a_folder_is_read_in_order_without_what_is_no_data(write_jsonl, tmp_path):
    for name in ("b/2.jsonl", "a.jsonl", "b/1.jsonl", ".cache/x.jsonl"):
        write_jsonl(name, [name])
    (tmp_path / "README.md").write_text("about")
    assert texts_at(tmp_path) == ["a.jsonl", "b/1.jsonl", "b/2.jsonl"]


def test_a_glob_is_read_in_order(write_jsonl, tmp_path):
    for name in ("part-2.jsonl", "part-1.jsonl", "deep/er/part-3.jsonl", "other.jsonl"):
        write_jsonl(name, [name])
    assert texts_at(tmp_path / "part-*.jsonl") == ["part-1.jsonl", "part-2.jsonl"]
    assert texts_at(tmp_path / "**" / "part-[13].jsonl") == ["deep/er/part-3.jsonl", "part-1.jsonl"]
    assert len(texts_at(tmp_path / "**")) == 4


def test_a_path_may_begin_in_the_home_folder(write_jsonl, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl("a.jsonl", ["mar"])
    assert texts_at("~/a.jsonl") == texts_at("~/*.jsonl") == ["mar"]


def test_a_file_whose_name_looks_like_a_pattern_is_read(write_jsonl):
    assert texts_at(write_jsonl("a[1].jsonl", ["mar"])) == ["mar"]


@pytest.mark.parametrize("name", ["nothing.jsonl", "*.jsonl", "no/such/**/*.txt", "**"])
def test_a_path_without_files_is_named(tmp_path, name):
    assert f"there is no file {tmp_path / name}" in refusal(FilesConfig(path=str(tmp_path / name)))
    with pytest.raises(UserError, match="there is no file"):
        fingerprint(FilesConfig(path=str(tmp_path / name)))


def test_a_pattern_that_matches_nothing_is_refused(tmp_path):
    message = refusal(FilesConfig(path=str(tmp_path / "a**" / "*.txt")))
    assert "there is no file" in message


def test_a_folder_without_data_says_what_can_be_read(tmp_path):
    (tmp_path / "README.md").write_text("about")
    assert ".jsonl, .txt" in refusal(FilesConfig(path=str(tmp_path)))


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.parquet.gz", "a.gz", "a"])
def test_a_file_of_another_kind_is_refused(tmp_path, name):
    (tmp_path / name).write_text("x")
    assert f"{name} has a format that cannot be read; .jsonl" in refusal(FilesConfig(path=str(tmp_path / name)))


def test_a_missing_column_is_refused_with_the_columns_found(write_jsonl, tmp_path):
    path = write_jsonl("a.jsonl", [{"id": 1, "content": "mar"}])
    assert "a.jsonl:1: no column 'text'; it has id, content" in refusal(FilesConfig(path=str(path)))
    parquet.write_table(pyarrow.table({"id": [1], "content": ["mar"]}), tmp_path / "a.parquet")
    message = refusal(FilesConfig(path=str(tmp_path / "a.parquet")))
    assert "no column 'text'; it has id, content: set data.sources.web.columns.text" in message


BROKEN_LINES = {
    "cut": (b'{"text": "la m', "not JSON"),
    "a list": (b'["la mar"]', "not a JSON object"),
    "a number": (b'{"text": 3}', "the text is a int, not a string"),
    "a surrogate": (rb'{"text": "la \ud83d mar"}', "half of a surrogate pair"),
    "latin-1": ('{"text": "l\'àvia"}'.encode("latin-1"), "not UTF-8 (byte 0xe0)"),
    "too deep": (b"[" * 100_000, "not JSON"),
}


@pytest.mark.parametrize(("line", "problem"), BROKEN_LINES.values(), ids=BROKEN_LINES)
def test_a_broken_line_is_refused_with_its_place_or_left_out_and_counted(tmp_path, line, problem):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "mar"}\n' + line + b'\n{"text": "cel"}\n')
    message = refusal(FilesConfig(path=str(path)))
    assert f"{path}:2: " in message and problem in message and "data.skip_broken_lines=true" in message
    texts, counts = read(FilesConfig(path=str(path)), skip_broken_rows=True)
    assert texts == ["mar", "cel"]
    assert (counts.documents, counts.broken) == (2, 1)
    assert counts.first_broken.startswith(f"{path}:2: ")


def test_a_surrogate_pair_is_one_character(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rb'{"text": "\ud83d\udc0c"}')
    assert texts_at(tmp_path / "a.jsonl") == ["🐌"]


def test_bad_utf8_in_txt_is_refused_with_its_line_or_left_out_and_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"un\n--\ndos\nb\xe0d\n--\ntres")
    source = FilesConfig(path=str(path), document_separator="\n--\n")
    assert f"{path}:4: not UTF-8 (byte 0xe0)" in refusal(source)
    texts, counts = read(source, skip_broken_rows=True)
    assert texts == ["un", "tres"]
    assert counts.broken == 1


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "changed", "other"])
def test_a_damaged_packed_file_is_refused(tmp_path, suffix, damage):
    path = tmp_path / f"a.jsonl{suffix}"
    generator = random.Random(0)
    lines = b"".join(json.dumps({"text": generator.randbytes(20).hex()}).encode() + b"\n" for _ in range(500))
    content = packed(lines, suffix)
    middle = len(content) // 2
    changed = content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 50]) + content[middle + 50 :]
    path.write_bytes({"cut": content[:middle], "changed": changed, "other": b"hello" * 20}[damage])
    message = refusal(FilesConfig(path=str(path)))
    assert str(path) in message
    if damage != "changed":  # what has changed may unpack to lines that are broken
        assert "is damaged" in message or "is truncated" in message


def test_a_zst_file_without_the_library_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(packed(LINES, ".zst"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "pip install '.[zstd]'" in refusal(FilesConfig(path=str(tmp_path / "a.jsonl.zst")))


def test_empty_documents_are_left_out_and_counted(write_jsonl):
    path = write_jsonl("a.jsonl", ["mar", "", " \n\t", {"text": None}, "cel"])
    texts, counts = read(FilesConfig(path=str(path)))
    assert texts == ["mar", "cel"]
    assert counts == ReadCounts(documents=2, empty=3)


def test_an_empty_file_has_no_document(tmp_path):
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / name).touch()
    assert texts_at(tmp_path) == []


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_the_bytes_read_add_up_to_those_announced(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed(b'{"text": ""}\n{"text": "mar"}\n' * 50, suffix))
    source = open_source("web", FilesConfig(path=str(path)))
    assert sum(size for _, size in source.documents()) == source.size_bytes()


def test_the_fingerprint_of_files_follows_their_content_and_the_settings(write_jsonl, tmp_path):
    path = write_jsonl("data/a.jsonl", ["mar"])
    source = FilesConfig(path=str(path))
    first = fingerprint(source)
    assert fingerprint(FilesConfig(path=str(path), weight=2.0)) == first
    assert fingerprint(FilesConfig(path=str(path.parent))) == first
    assert fingerprint(FilesConfig(path=str(path), columns=ColumnsConfig(text="content"))) != first
    os.utime(path, (1, 1))
    second = fingerprint(source)
    write_jsonl("data/b.jsonl", ["cel"])
    assert len({first, second, fingerprint(FilesConfig(path=str(path.parent)))}) == 3


def test_the_fingerprint_of_a_dataset_follows_its_name_and_revision():
    prints = {
        fingerprint(HubConfig(dataset="a/b", **settings))
        for settings in (
            {},
            {"revision": "x"},
            {"split": "test"},
            {"subset": "ca"},
            {"columns": ColumnsConfig(text="content")},
        )
    }
    assert len(prints) == 5
    assert fingerprint(HubConfig(dataset="a/b", streaming=True)) in prints


def test_the_embedded_corpus_joins_title_and_text(tmp_path, monkeypatch):
    path = tmp_path / "catalan.jsonl"
    path.write_text(json.dumps({"title": "El mar", "genre": "poema", "text": "Blau."}) + "\n")
    monkeypatch.setattr(embedded, "CORPORA", tmp_path)
    source = EmbeddedConfig(embedded="catalan")
    assert texts_of(source) == ["El mar\n\nBlau."]
    first = fingerprint(source)
    path.write_text(json.dumps({"title": "El mar", "genre": "poema", "text": "Verd."}) + "\n")
    assert fingerprint(source) != first


@dataclass
class LinesConfig(SourceConfig):
    lines: str | None = None


class LinesSource(Source[LinesConfig]):
    def rows(self, columns=None):
        for number, line in enumerate(self.config.lines.split(","), start=1):
            yield {"text": line}, len(line), f"line {number}"

    def fingerprint(self):
        return fingerprint_of(self.config, self.config.lines)


class Lines(SourceKind):
    name = "lines"
    config = LinesConfig
    source = LinesSource


def test_another_kind_of_source_is_a_config_rows_and_a_fingerprint(monkeypatch):
    monkeypatch.setattr(
        SOURCES, "_entries", {**{name: SOURCES.get(name) for name in SOURCES.names()}, "lines": Lines()}
    )
    assert texts_of(LinesConfig(lines="la mar,,el bosc")) == ["la mar", "el bosc"]
    assert fingerprint(LinesConfig(lines="la mar")) != fingerprint(LinesConfig(lines="el bosc"))


class TestHuggingFace:
    @pytest.fixture
    def hub(self, monkeypatch):
        """Answers load_dataset with rows made here."""

        def offer(rows: dict[str, list[object]]) -> None:
            def load_dataset(name, subset, split, revision, streaming):
                assert (name, subset, split, revision) == ("a/b", None, "train", None)
                loaded = datasets.Dataset.from_dict(rows)
                return loaded.to_iterable_dataset() if streaming else loaded

            monkeypatch.setattr(datasets, "load_dataset", load_dataset)

        return offer

    @pytest.mark.parametrize("streaming", [False, True])
    def test_rows_are_read_in_order(self, hub, streaming):
        hub({"id": list(range(1000)), "text": [None, *(f"document {number}" for number in range(999))]})
        source = HubConfig(dataset="a/b", streaming=streaming)
        texts, counts = read(source)
        assert texts == [f"document {number}" for number in range(999)]
        assert counts == ReadCounts(documents=999, empty=1)
        assert open_source("web", source).size_bytes() is None

    @pytest.mark.parametrize("streaming", [False, True])
    def test_a_missing_column_is_refused_with_the_columns_found(self, hub, streaming):
        hub({"id": [1], "content": ["mar"]})
        message = refusal(HubConfig(dataset="a/b", streaming=streaming))
        assert "no column 'text'; it has id, content: set data.sources.web.columns.text" in message

    def test_a_stream_that_does_not_know_its_columns_is_checked_by_its_rows(self, monkeypatch):
        rows = datasets.IterableDataset.from_generator(lambda: iter([{"content": "mar"}]))
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
        assert "no column 'text'; it has content" in refusal(HubConfig(dataset="a/b", streaming=True))

    def test_values_that_are_no_text_are_refused_with_their_row(self, hub):
        hub({"text": [["a"], ["b"]]})
        assert "dataset a/b split train, row 1: the text is a list" in refusal(HubConfig(dataset="a/b"))

    @pytest.mark.parametrize(
        "error",
        [
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist\non the Hub"),
            ValueError("Unknown split"),
            ConnectionError("no network"),
            RuntimeError(),
        ],
    )
    def test_what_the_hub_raises_becomes_one_line(self, monkeypatch, error):
        def load_dataset(*args, **kwargs):
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        message = refusal(HubConfig(dataset="a/b", subset="ca"))
        assert "data.sources.web: dataset a/b ca split train cannot be read" in message
        assert type(error).__name__ in message

    def test_a_stream_that_breaks_becomes_one_line(self, monkeypatch):
        def rows():
            yield {"text": "mar"}
            raise ConnectionError("the network is gone")

        stream = datasets.IterableDataset.from_generator(
            rows, features=datasets.Features(text=datasets.Value("string"))
        )
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)
        assert "the network is gone" in refusal(HubConfig(dataset="a/b", streaming=True))

    def test_a_split_that_is_not_there_is_named_by_the_real_library(self, write_jsonl, monkeypatch, tmp_path):
        write_jsonl("set/train.jsonl", ["mar"])
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        source = HubConfig(dataset=str(tmp_path / "set"), streaming=True)
        assert texts_of(source) == ["mar"]
        source.split = "test"
        assert "split test cannot be read" in refusal(source)


@pytest.mark.parametrize(
    ("name", "what"),
    [("bomb.jsonl.gz", "line"), ("bomb.txt.gz", "document"), ("bomb.jsonl", "line"), ("b.txt", "document")],
)
@pytest.mark.parametrize("separator", [None, "<sep>"])
def test_text_that_would_not_fit_memory_is_refused(tmp_path, monkeypatch, name, what, separator):
    monkeypatch.setattr(files, "MAX_TEXT_BYTES", 2_000_000)
    content = b"x" * 5_000_000
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    source = FilesConfig(path=str(tmp_path / name), document_separator=separator)
    with pytest.raises(UserError, match=rf"{name} holds a {what} of over 1 MiB"):
        read(source, skip_broken_rows=True)
