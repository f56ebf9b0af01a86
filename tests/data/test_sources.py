import bz2
import gzip
import json
import lzma
import os
import random
import sys
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from cucafera.config.command_line import command_line_problems, composed_config
from cucafera.config.errors import UserError
from cucafera.config.registry import SOURCES
from cucafera.config.schema import ColumnsConfig, SourceConfig
from cucafera.data import compression
from cucafera.data.sources import (
    ReadCounts,
    Source,
    SourceKind,
    _rows,
    embedded,
    fingerprint_of,
    hub,
    open_source,
    source_notes,
)
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
    zst = zstandard.ZstdCompressor(write_checksum=True).compress
    pack = {".gz": gzip.compress, ".zst": zst, ".bz2": bz2.compress, ".xz": lzma.compress, "": bytes}[suffix]
    return pack(content)


LINES = b'{"text": "la mar\\r\\n"}\n\n{"text": "el bosc", "id": 3}'


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2", ".xz"])
def test_jsonl_is_read_plain_and_packed(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed(LINES, suffix))
    assert texts_at(path) == ["la mar\r\n", "el bosc"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_txt_file_is_one_document_with_line_ends_of_any_system_as_newlines(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(packed("l'àvia\r\n\r\ncanta\rsola\n".encode(), suffix))
    assert texts_at(path) == ["l'àvia\n\ncanta\nsola\n"]


def test_a_separator_divides_a_txt_file_into_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("un\nçç##dos####  \n##tres".encode())
    texts, counts = read(FilesConfig(path=str(path), document_separator="##"))
    assert texts == ["un\nçç", "dos", "tres"]
    assert counts == ReadCounts(documents=3, empty=2)


@pytest.mark.parametrize("separator", ["\n\n", r"\n\n", r"\r\n\r\n", "\r\n\r\n"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_separator_of_line_ends_matches_those_of_any_system(tmp_path, monkeypatch, separator, line_end, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(packed("un\ndos\n\ntres\n\nquatre".replace("\n", line_end).encode(), suffix))
    for size in (1, 2, 3, 1000):
        monkeypatch.setattr(_rows, "CHUNK_BYTES", size)
        assert texts_at(path, document_separator=separator) == ["un\ndos", "tres", "quatre"]


def test_escapes_of_a_separator_are_those_of_line_ends_tabs_and_the_backslash(tmp_path):
    path = tmp_path / "a.txt"
    for written, separator in ((r"\t", "\t"), (r"\\n", r"\n"), (r"\x", r"\x"), (r"\\", "\\")):
        path.write_text(f"un{separator}dos")
        assert texts_at(path, document_separator=written) == ["un", "dos"]


def test_a_separator_that_does_not_occur_is_noted(tmp_path):
    for name, text in (("a.txt", "un##dos"), ("b.txt", "tres"), ("c.txt", "")):
        (tmp_path / name).write_text(text)
    counts = read(FilesConfig(path=str(tmp_path), document_separator="##"))[1]
    assert counts.notes == [
        f"1 of its files hold no row, such as {tmp_path}/c.txt",
        f"no document_separator in 1 of 2 .txt files, each of which is one document, such as {tmp_path}/b.txt",
    ]
    (tmp_path / "a.jsonl").write_text('{"text": "mar"}')
    assert notes(FilesConfig(path=str(tmp_path / "a.jsonl"), document_separator="##")) == [
        "document_separator has no effect: there is no .txt file"
    ]


def test_separators_are_found_across_chunks(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    documents = ["x" * length for length in range(1, 40)]
    path.write_text("<sep>".join(documents))
    for size in (1, 2, 3, 7, 1000):
        monkeypatch.setattr(_rows, "CHUNK_BYTES", size)
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
@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), "dictionary"])
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


def test_a_parquet_column_that_is_all_null_has_only_empty_documents(tmp_path):
    parquet.write_table(pyarrow.table({"text": pyarrow.nulls(300)}), tmp_path / "a.parquet")
    assert read(FilesConfig(path=str(tmp_path / "a.parquet"))) == ([], ReadCounts(empty=300))


def test_a_parquet_column_of_numbers_is_refused(tmp_path):
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert "a.parquet, row 1: the text is a int, not a string" in refusal(FilesConfig(path=str(tmp_path / "a.parquet")))


def test_a_parquet_column_of_bytes_is_text_if_it_is_utf8(tmp_path):
    column = pyarrow.array(["l'àvia".encode(), b"m\xff"], pyarrow.binary())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert "a.parquet, row 2: not UTF-8 (byte 0xff)" in refusal(FilesConfig(path=str(tmp_path / "a.parquet")))
    assert read(FilesConfig(path=str(tmp_path / "a.parquet")), skip_broken_rows=True)[0] == ["l'àvia"]


def test_a_cut_parquet_file_is_refused(tmp_path):
    buffer = BytesIO()
    parquet.write_table(pyarrow.table({"text": ["mar"] * 100}), buffer)
    (tmp_path / "a.parquet").write_bytes(buffer.getvalue()[:-20])
    assert "a.parquet is damaged or truncated" in refusal(FilesConfig(path=str(tmp_path / "a.parquet")))


def notes(source: SourceConfig) -> list[str]:
    return list(open_source("web", source).notes())


def test_a_folder_is_read_in_order_and_what_is_left_out_is_counted(write_jsonl, tmp_path):
    for name in ("b/2.jsonl", "a.jsonl", "b/1.jsonl", ".cache/x.jsonl", "b/._1.jsonl"):
        write_jsonl(name, [name])
    for name in ("README.md", "b/README.md", "x.PDF", "LICENSE", "a.tar.gz"):
        (tmp_path / name).write_text("about")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert texts_at(tmp_path) == ["a.jsonl", "b/1.jsonl", "b/2.jsonl"]
    assert notes(FilesConfig(path=str(tmp_path))) == [
        "6 files left out: 2 .md, 1 without suffix, 1 .tar.gz, 1 pipe, socket or device, 1 .pdf; hidden: 2"
    ]


def test_a_folder_holds_data_of_every_format_with_suffixes_in_any_case(tmp_path):
    row, rows = '{"text": "%s"}\n', '[{"text": "%s"}]'
    contents = {"a.jsonl": row, "B.JSONL": row, "c.TXT": "%s", "d.json": rows, "f.ndjson": row, "h.csv": "text\n%s\n"}
    for name, content in contents.items():
        (tmp_path / name).write_text(content % name)
    for name, content in {"c4.json.gz": row, "g.jsonl.GZ": row, "i.tsv.gz": "text\n%s\n"}.items():
        (tmp_path / name).write_bytes(gzip.compress((content % name).encode()))
    assert texts_at(tmp_path) == sorted([*contents, "c4.json.gz", "g.jsonl.GZ", "i.tsv.gz"])
    assert notes(FilesConfig(path=str(tmp_path))) == []


@pytest.mark.parametrize("pattern", ["", "**", "**/*.jsonl"])
def test_symlinks_are_followed_without_loops_and_each_file_is_read_once(write_jsonl, tmp_path, pattern):
    write_jsonl("elsewhere/1.jsonl", ["linked folder"])
    write_jsonl("elsewhere2/blob", ["linked file"])
    write_jsonl("data/a.jsonl", ["a"])
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/c.jsonl").symlink_to(tmp_path / "elsewhere2/blob")
    (tmp_path / "data/d.jsonl").symlink_to("a.jsonl")
    (tmp_path / "data/sub").mkdir()
    (tmp_path / "data/sub/up").symlink_to("..")
    source = FilesConfig(path=str(tmp_path / "data" / pattern))
    assert texts_of(source) == ["a", "linked folder", "linked file"]
    assert "found by a second path, read once" in notes(source)[0]


def test_a_file_that_only_a_visible_link_names_is_read_as_in_the_cache_of_the_hub(write_jsonl, tmp_path):
    write_jsonl("blobs/0123", ["mar"])
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots/a.jsonl").symlink_to("../blobs/0123")
    assert texts_at(tmp_path) == ["mar"]
    assert notes(FilesConfig(path=str(tmp_path))) == []


@pytest.mark.parametrize("target", ["nowhere.jsonl", "a.jsonl"])
def test_a_symlink_that_leads_nowhere_is_refused(write_jsonl, tmp_path, target):
    write_jsonl("b.jsonl", ["mar"])
    (tmp_path / "a.jsonl").symlink_to(target)
    for path in (tmp_path, tmp_path / "*.jsonl", tmp_path / "a.jsonl"):
        assert f"{tmp_path}/a.jsonl" in refusal(FilesConfig(path=str(path)))


def test_a_folder_that_cannot_be_listed_is_refused_unless_it_is_hidden(write_jsonl, tmp_path, monkeypatch):
    write_jsonl("a.jsonl", ["mar"])
    (tmp_path / "closed").mkdir()
    (tmp_path / ".closed").mkdir()
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    message = refusal(FilesConfig(path=str(tmp_path)))
    assert message == f"data.sources.web: cannot read the folder {tmp_path}/closed: Permission denied"
    (tmp_path / "closed").rmdir()
    assert texts_at(tmp_path) == ["mar"]


def test_a_glob_is_read_in_order(write_jsonl, tmp_path):
    for name in ("part-2.jsonl", "part-1.jsonl", "deep/er/part-3.jsonl", "other.jsonl"):
        write_jsonl(name, [name])
    assert texts_at(tmp_path / "part-*.jsonl") == ["part-1.jsonl", "part-2.jsonl"]
    assert texts_at(tmp_path / "**" / "part-[13].jsonl") == ["deep/er/part-3.jsonl", "part-1.jsonl"]
    assert texts_at(tmp_path / "**" / "er" / "*") == ["deep/er/part-3.jsonl"]
    assert len(texts_at(tmp_path / "**")) == 4


def test_a_glob_skips_hidden_files_as_a_folder_does_unless_it_names_them(write_jsonl, tmp_path):
    for name in ("a.jsonl", "._a.jsonl", ".cache/x.jsonl"):
        write_jsonl(name, [name])
    (tmp_path / "notes.md").touch()
    assert texts_at(tmp_path / "*") == texts_at(tmp_path / "**/*.jsonl") == texts_at(tmp_path / "**") == ["a.jsonl"]
    assert notes(FilesConfig(path=str(tmp_path / "**/*"))) == ["1 file left out: 1 .md; hidden: 2"]
    assert notes(FilesConfig(path=str(tmp_path / "*.jsonl"))) == ["hidden files left out: 1"]
    assert texts_at(tmp_path / ".cache/*.jsonl") == texts_at(tmp_path / ".cache") == [".cache/x.jsonl"]
    assert texts_at(tmp_path / "._*.jsonl") == texts_at(tmp_path / "._a.jsonl") == ["._a.jsonl"]


def test_a_folder_that_a_glob_matches_is_read_and_said(write_jsonl, tmp_path):
    for name in ("a.jsonl", "old/b.jsonl"):
        write_jsonl(name, [name])
    assert texts_at(tmp_path / "*") == ["a.jsonl", "old/b.jsonl"]
    assert notes(FilesConfig(path=str(tmp_path / "*"))) == ["1 file read from folders that the pattern matches"]


def test_files_that_others_hold_out_are_trained_on_and_said(write_jsonl, tmp_path):
    for name in ("data/train-00000.jsonl", "data/test-00000.jsonl", "data/latest.jsonl"):
        write_jsonl(name, [name])
    config = FilesConfig(path=str(tmp_path / "data"))
    assert len(texts_of(config)) == 3
    assert [note.partition(" are ")[0] for note in notes(config)] == ["files named train and test"]
    assert not notes(FilesConfig(path=str(tmp_path / "data/train*")))


def test_a_path_may_be_a_list_in_which_each_must_match(write_jsonl, tmp_path):
    for name in ("b/1.jsonl", "a.jsonl", "c/x.jsonl"):
        write_jsonl(name, [name])
    paths = [str(tmp_path / name) for name in ("b/", "a.jsonl", "[bc]/*.jsonl", "a.jsonl")]
    assert texts_of(FilesConfig(path=paths)) == ["a.jsonl", "b/1.jsonl", "c/x.jsonl"]
    assert notes(FilesConfig(path=paths)) == ["2 files found by a second path, read once"]
    assert "there is no file" in refusal(FilesConfig(path=[*paths, str(tmp_path / "*.txt")]))


def test_a_list_of_paths_is_composed_and_an_empty_path_or_separator_refused():
    path = "data.sources.files.path"
    assert composed_config(["data=files", f"{path}=[a.jsonl,b/]"]).data.sources["files"].path == ["a.jsonl", "b/"]
    problems = command_line_problems(["data=files", f"{path}=[a.jsonl,'']", "data.sources.files.document_separator=''"])
    assert problems == [
        f"{path} has an empty item; each must be a file, folder or glob",
        "data.sources.files.document_separator is empty; give a text, or null: a file is one document",
    ]
    assert composed_config(["data=files", f"{path}=[{{}},null]"]).data.sources["files"].path == ["{}", "null"]


def test_files_of_two_sources_are_compared(write_jsonl, tmp_path):
    write_jsonl("a.jsonl", ["mar"])
    write_jsonl("b.jsonl", ["mar"])
    both, one = FilesConfig(path=str(tmp_path)), FilesConfig(path=str(tmp_path / "a.jsonl"))
    assert list(source_notes({"x": both, "y": one})) == [
        f"data.sources.y: reads the same as data.sources.x: {tmp_path}/a.jsonl"
    ]
    assert list(source_notes({"x": HubConfig(dataset=str(tmp_path)), "y": one})) == []


def test_a_path_may_begin_in_the_home_folder(write_jsonl, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl("a.jsonl", ["mar"])
    assert texts_at("~/a.jsonl") == texts_at("~/*.jsonl") == ["mar"]


def test_a_path_that_looks_like_a_pattern_and_exists_is_read_as_it_is(write_jsonl, tmp_path):
    write_jsonl("a.jsonl", ["other"])
    assert texts_at(write_jsonl("[ab].jsonl", ["mar"])) == ["mar"]
    write_jsonl("t[1]/a.jsonl", ["cel"])
    assert texts_at(tmp_path / "t[1]/*.jsonl") == ["cel"]


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "~no-such-user/a", "/dev/null"])
def test_a_path_that_no_system_can_open_is_one_line(path):
    assert refusal(FilesConfig(path=path)).startswith("data.sources.web: ")


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    assert "is no regular file" in refusal(FilesConfig(path=str(tmp_path / "a.jsonl")))


def test_a_file_that_changes_while_it_is_read_is_refused(write_jsonl):
    path = write_jsonl("a.jsonl", ["mar", "cel"])
    documents = open_source("web", FilesConfig(path=str(path))).documents()
    next(documents)
    with path.open("a") as file:
        file.write('{"text": "bosc"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was read"):
        list(documents)


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


@pytest.mark.parametrize("name", ["a.sqlite", "a.parquet.gz", "a.gz", "a"])
def test_a_file_of_another_kind_is_refused(tmp_path, name):
    (tmp_path / name).write_text("x")
    assert f"{name} has a format that cannot be read; .jsonl" in refusal(FilesConfig(path=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("a.xlsx", "save the sheet as .csv"), ("a.PDF", "extract its text into a .txt file"), ("a.tar.gz", "extract"),
        ("a.md", "if it is plain text, let its name end"), ("a.feather", "convert it to .parquet"),
    ],
)  # fmt: skip
def test_a_file_of_a_known_kind_is_refused_with_what_to_do(tmp_path, name, advice):
    (tmp_path / name).write_text("x")
    assert f"{name} has a format that cannot be read: {advice}" in refusal(FilesConfig(path=str(tmp_path / name)))


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


JSON_FILES = {
    "an array": b'\n [ {"text": "mar"} ,\r\n{"text":"c\xc3\xa8l"}]\n',
    "an array of one line": b'[{"text":"mar"},{"text":"c\xc3\xa8l"}]',
    "lines": b'\n{"text": "mar"}\n\n{"text": "c\xc3\xa8l"}',
    "a mark": b'\xef\xbb\xbf[{"text": "mar"}, {"text": "c\\u00e8l", "more": [[1.5e3], {"a": "]\\"}"}]}]',
}


@pytest.mark.parametrize("content", JSON_FILES.values(), ids=JSON_FILES)
def test_a_json_file_is_an_array_of_objects_or_json_lines(tmp_path, monkeypatch, content):
    (tmp_path / "a.json").write_bytes(content)
    for size in (1, 2, 3, 7, 1000):
        monkeypatch.setattr(_rows, "CHUNK_BYTES", size)
        assert texts_at(tmp_path / "a.json") == ["mar", "cèl"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{\n"data": [{"text": "mar"}]}', "a.json:1: an object of several lines; give an array of objects"),
        ('{"data": [{"text": "mar"}]}', "a.json holds one object, whose 'data' is a list; give an array of objects"),
        ('{"text": ["mar"], "id": [1]}', "a.json holds one object, whose 'text' is a list"),
        ('[{"text": "mar"},', "a.json:1: not JSON: the file is truncated"),
        ('[{"text": "mar"}', "the array has no end; the file is truncated"),
        ('[\n{"text": "ma', "a.json:2: not JSON: the file is truncated"),
        ('[{"text": "mar"} {"text": "cel"}]', "a comma or ] is missing"),
        ('[{"text": "mar"},]', "a.json:1: not JSON: Expecting value"),
        ('[{"text": "mar"}]\n[]', "a.json:2: not JSON: text after the end of the array"),
        ('[{"text": 1' + "0" * 5000 + "}]", "a.json:1: not JSON: Exceeds the limit"),
        ("[" * 100_000, "a.json:1: not JSON: "),
    ],
)
def test_what_leaves_no_row_of_a_json_file_to_read_is_refused_although_broken_rows_are_skipped(
    tmp_path, content, problem
):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError) as caught:
        read(FilesConfig(path=str(tmp_path / "a.json")), skip_broken_rows=True)
    assert problem in str(caught.value)


def test_a_broken_item_of_an_array_is_refused_with_its_line_or_left_out_and_counted(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "mar"},\n3,\n{"text": "b\xe0"},\n{"text": 3},\n{"text": "cel"}]')
    assert f"{path}:2: not a JSON object" in refusal(FilesConfig(path=str(path)))
    texts, counts = read(FilesConfig(path=str(path)), skip_broken_rows=True)
    assert (texts, counts.broken) == (["mar", "cel"], 3)


def test_an_array_in_a_jsonl_file_gets_the_advice_to_rename_it(tmp_path):
    (tmp_path / "a.jsonl").write_text('[{"text": "mar"}]\n')
    assert "an array is read from a .json file" in refusal(FilesConfig(path=str(tmp_path / "a.jsonl")))


TABLES = {
    "a.csv": 'text,id\r\n"la\r\nmar ""gran""",1\r\n\r\ncel,2\r\n',
    "b.csv": 'id;text\n1;"la\r\nmar ""gran"""\n2;cel\n',
    "c.tsv": '\ttext\n0\t"la\r\nmar ""gran"""\n1\tcel',
    "d.CSV": 'text\r"la\r\nmar ""gran"""\rcel\r',
    "e.csv": '\ufeff\ntext,més\n"la\r\nmar ""gran""",\ncel,\n,x\n',
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_a_header_quoted_fields_and_any_usual_delimiter(tmp_path, name, suffix):
    (tmp_path / f"{name}{suffix}").write_bytes(packed(TABLES[name].encode(), suffix))
    assert texts_at(tmp_path / f"{name}{suffix}") == ['la\r\nmar "gran"', "cel"]


def test_a_field_may_be_long_and_an_empty_one_is_null(tmp_path):
    (tmp_path / "a.csv").write_text("text,id\n" + "x" * 200_000 + ",\n")
    rows = list(open_source("web", FilesConfig(path=str(tmp_path / "a.csv"))).rows())
    assert [row for row, _, _ in rows] == [{"text": "x" * 200_000, "id": None}]


def test_a_broken_row_of_a_table_is_refused_with_its_line_or_left_out_and_counted(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,id\n"la\nmar",1\nmassa,2,3\npoc\nb\xe0,1\n"x"y,1\ncel,1\n"obert,1\n')
    assert f"{path}:4: fields: 3, in the first row: 2" in refusal(FilesConfig(path=str(path)))
    texts, counts = read(FilesConfig(path=str(path)), skip_broken_rows=True)
    assert texts == ["la\nmar", "cel"]
    assert (counts.broken, counts.first_broken) == (5, f"{path}:4: fields: 3, in the first row: 2")


def test_all_lines_that_an_unclosed_quote_makes_one_row_are_counted(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,id\ncel,1\n"obert,2\nla mar,3\nmassa,4\n')
    texts, counts = read(FilesConfig(path=str(path)), skip_broken_rows=True)
    assert (texts, counts.broken) == (["cel"], 3)
    assert counts.first_broken.startswith(f"{path}:3: not CSV: ")
    assert counts.first_broken.endswith("its quote makes one row of 3 lines")


@pytest.mark.parametrize(
    "content", ["sep=;\r\ntext;preu\r\nla mar;1,5\r\n", '"sep=|"\ntext|preu\nla mar|2\n', "text;;\nla mar;;\n"]
)
def test_a_table_of_a_spreadsheet_may_choose_its_delimiter_and_have_columns_without_a_name(tmp_path, content):
    (tmp_path / "a.csv").write_text(content, newline="")
    assert texts_at(tmp_path / "a.csv") == ["la mar"]


def test_a_message_is_one_line_whatever_the_names_of_files_and_columns_hold(tmp_path):
    path = tmp_path / "la\nmar.jsonl"
    path.write_text('{"a\\nb": 1}\n')
    message = refusal(FilesConfig(path=str(path)))
    assert r"la\nmar.jsonl:1: no column 'text'; it has a\nb" in message
    assert "\n" not in message
    assert "\n" not in read(FilesConfig(path=str(path)), skip_broken_rows=True)[1].first_broken
    (tmp_path / "x.p\ndf").touch()
    assert not any("\n" in note for note in source_notes({"web": FilesConfig(path=str(tmp_path))}))


def test_counts_of_a_file_whose_name_is_not_utf8_can_be_stored(tmp_path):
    for name in (b"l\xe0.jsonl", b"\xe0.txt"):
        (tmp_path / os.fsdecode(name)).write_text("{}\n" if name.endswith(b"l") else "")
    counts = read(FilesConfig(path=str(tmp_path)), skip_broken_rows=True)[1]
    assert r"l\udce0.jsonl:1: no column 'text'" in counts.first_broken
    assert r"\udce0.txt" in counts.notes[0]
    (counts.first_broken + counts.notes[0]).encode()


def test_a_parquet_file_with_a_column_twice_is_refused(tmp_path):
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert "names the column 'text' more than once" in refusal(FilesConfig(path=str(tmp_path / "a.parquet")))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("la mar,1\n", "a.csv:1: the first row has no column 'text'; it has la mar, 1"),
        ("text,text\na,b\n", "a.csv:1: the first row names the column 'text' more than once"),
        ("a;text,b\n", "has ',' as often as ';'"),
    ],
)
def test_a_header_that_does_not_name_the_columns_is_refused(tmp_path, content, problem):
    (tmp_path / "a.csv").write_text(content)
    assert problem in refusal(FilesConfig(path=str(tmp_path / "a.csv")))


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_lines_end_as_on_any_system_and_nowhere_else(tmp_path, line_end):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\u2028b\x85c"}\n{"text": "cel"}\n\n3'.replace("\n", line_end), newline="")
    assert f"{path}:4: not a JSON object" in refusal(FilesConfig(path=str(path)))
    path.write_text('{"text": "a\u2028b\x85c"}\n{"text": "cel"}\n'.replace("\n", line_end), newline="")
    assert texts_at(path) == ["a\u2028b\x85c", "cel"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", '{"text": "ç"}'.encode("utf-16"), "is UTF-16, not UTF-8: convert it"),
        ("a.jsonl", '{"text": "ç"}'.encode("utf-32"), "is UTF-32, not UTF-8: convert it"),
        ("a.csv", "text\nç".encode("utf-16-be"), "begins with NUL bytes"),
        ("a.txt", bz2.compress(LINES), "is compressed by bzip2: let its name end with .bz2"),
        ("a.txt", lzma.compress(LINES), "is compressed by xz: let its name end with .xz"),
        ("a.csv", b"PK\x03\x04", "is a zip archive, as those of office programs are"),
        ("a.jsonl", b"PAR1", "is a parquet file: let its name end with .parquet"),
        ("a.txt", b"ARROW1\0\0", "is an Arrow file: convert it"),
        ("a.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is a file of an office program: save a sheet as .csv"),
        ("a.jsonl", b"\n<!DOCTYPE html>\n<html>", "is a web page or XML, perhaps the error page of a download"),
        ("a.txt", b"%PDF-1.7\n", "is a PDF: extract its text"),
        *[
            (name, b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "is a pointer of Git LFS, not the")
            for name in ("a.txt", "a.csv", "a.jsonl", "a.parquet")
        ],
        ("a.txt", b"la mar i el bosc\0", "a.txt:1: a document with NUL characters"),
        ("a.jsonl", gzip.compress(LINES, mtime=0), "is compressed by gzip: let its name end with .gz"),
        ("a.txt", zstandard.compress(LINES), "is compressed by zstd: let its name end with .zst"),
        ("a.jsonl.gz", b"", "a.jsonl.gz is truncated: it is empty"),
        ("a.jsonl.zst", b"", "a.jsonl.zst is truncated: it is empty"),
    ],
)
def test_a_file_that_is_no_utf8_text_is_refused_with_what_it_is(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    assert problem in refusal(FilesConfig(path=str(tmp_path / name)))


def test_a_gz_file_of_several_members_is_read_to_its_end(tmp_path):
    members = [gzip.compress(json.dumps({"text": text}).encode() + b"\n") for text in ("mar", "cel")]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(members))
    assert texts_at(tmp_path / "a.jsonl.gz") == ["mar", "cel"]


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.txt", "\ufeff"), ("a.csv", "text\n"), ("a.json", "[]"), ("a.json", "\n")]
)
def test_a_file_without_rows_is_noted(write_jsonl, tmp_path, name, content):
    write_jsonl("b.jsonl", ["mar"])
    (tmp_path / name).write_text(content)
    texts, counts = read(FilesConfig(path=str(tmp_path)))
    assert texts == ["mar"]
    assert counts == ReadCounts(1, notes=[f"1 of its files hold no row, such as {tmp_path / name}"])


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


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
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


def test_columns_of_pairs_are_part_of_a_fingerprint_only_if_they_are_named():
    before_there_were_pairs = "bbd015a4d6c43eece93b559b49f857e47fc16698830993189172c45b271bd860"
    assert fingerprint_of(SourceConfig(), "x") == before_there_were_pairs
    named = [ColumnsConfig(chosen="a"), ColumnsConfig(rejected="a"), ColumnsConfig(answer="a")]
    assert len({fingerprint_of(SourceConfig(columns=columns), "x") for columns in [ColumnsConfig(), *named]}) == 4


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


@pytest.fixture(autouse=True)
def newest(monkeypatch) -> dict[str, str]:
    """The newest commits on the hub, by dataset; empty as without a network."""
    commits: dict[str, str] = {}

    def dataset_info(api, dataset, revision, timeout):
        if dataset not in commits:
            raise ConnectionError("no network")
        return huggingface_hub.hf_api.DatasetInfo(id=dataset, sha=commits[dataset])

    monkeypatch.setattr(hub, "hub_problem", lambda: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "no-such-folder")
    hub._newest_commit.cache_clear()
    return commits


def test_the_fingerprint_of_a_dataset_follows_its_newest_commit(newest):
    source = HubConfig(dataset="a/b")
    prints = set()
    for commit in ("1" * 40, "2" * 40):
        newest["a/b"] = commit
        hub._newest_commit.cache_clear()
        prints.add(fingerprint(source))
        assert notes(source) == []
        prints.add(fingerprint(HubConfig(dataset="a/b", revision=commit)))
    assert len(prints) == 2


def test_without_a_network_the_downloaded_commit_counts_and_is_said(newest, tmp_path, monkeypatch):
    source = HubConfig(dataset="a/b")
    assert notes(source) == [
        "a/b: its downloaded copy is used, if any, and changes on the hub are not detected: ConnectionError: no network"
    ]
    reference = tmp_path / "datasets--a--b/refs/main"
    reference.parent.mkdir(parents=True)
    reference.write_text("1" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub._newest_commit.cache_clear()
    assert "the downloaded commit 111111111111 is used" in notes(source)[0]
    assert fingerprint(source) == fingerprint(HubConfig(dataset="a/b", revision="1" * 40))
    assert notes(HubConfig(dataset="a/b", revision="1" * 40)) == []


def test_a_dataset_in_a_folder_is_read_again_when_it_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "set/a.csv"
    path.parent.mkdir()
    path.write_text("text\nmar\n")
    source = HubConfig(dataset=str(path.parent))
    assert (texts_of(source), notes(source)) == (["mar"], [])
    first = fingerprint(source)
    status = path.stat()
    path.write_text("text\nmar\ncel\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as cp -p and rsync may leave it
    assert fingerprint(source) != first
    assert texts_of(source) == ["mar", "cel"]


def test_a_dataset_saved_to_disk_is_read_by_its_folder(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["mar", "cel"], "id": [1, 2]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "two")
    assert texts_of(HubConfig(dataset=str(tmp_path / "one"))) == ["mar", "cel"]
    assert texts_of(HubConfig(dataset=str(tmp_path / "two"), split="test")) == ["cel"]
    assert "leave them out" in refusal(HubConfig(dataset=str(tmp_path / "one"), split="test"))
    assert "split x cannot be read" in refusal(HubConfig(dataset=str(tmp_path / "two"), split="x"))
    for name in ("one", "two"):
        form = f"data.sources.web.path=null data.sources.web.dataset={tmp_path / name}"
        assert refusal(FilesConfig(path=str(tmp_path / name))).endswith(f"is a folder of save_to_disk: {form}")
    source = composed_config(["data=files", *form.replace("web", "files").split()]).data.sources["files"]
    assert texts_of(source) == ["mar", "cel"]


def test_a_folder_of_a_dataset_may_be_in_the_home_folder_and_one_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.csv").write_text("text\nmar\n")
    assert texts_of(HubConfig(dataset="~/mine")) == ["mar"]
    for name in ("~/nowhere", "./nowhere", "/nowhere"):
        with pytest.raises(UserError, match=f"data.sources.web: there is no folder {name}"):
            open_source("web", HubConfig(dataset=name)).check()
    open_source("web", HubConfig(dataset="OWNER/NAME")).check()


def test_what_the_datasets_library_writes_about_a_folder_is_no_data(write_jsonl, tmp_path):
    path = write_jsonl("a.jsonl", ["mar"])
    for name in ("dataset_infos.json", "dataset_info.json", "x/dataset_info.json", "x/state.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"default": {}}')
    assert texts_at(tmp_path) == texts_at(path) == ["mar"]
    (note,) = notes(FilesConfig(path=str(tmp_path)))
    assert note == "4 files left out: 2 dataset_info.json, 1 dataset_infos.json, 1 state.json"


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
    monkeypatch.setattr(_rows, "MAX_TEXT_BYTES", 2_000_000)
    content = b"x" * 5_000_000
    (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    source = FilesConfig(path=str(tmp_path / name), document_separator=separator)
    with pytest.raises(UserError, match=rf"{name} holds a {what} of over 1 MiB"):
        read(source, skip_broken_rows=True)
