"""Atomic writes, checksums, and symlinks that are not followed."""

import errno
import json
import logging
import os
import random

import pytest

from cucafera.output import RunLog
from cucafera.storage import (
    ChecksumError,
    PositionalFile,
    append,
    append_line,
    atomic_replace,
    atomic_write,
    flush,
    list_folder,
    parse_json,
    read_json_with_checksum,
    read_small_file,
    write_json_with_checksum,
    write_text,
)


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "report.md"
    write_text(path, "before")
    with pytest.raises(OSError), atomic_write(path) as file:
        file.write(b"half of")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]


def test_a_file_gets_its_name_only_when_its_content_is_on_disk(tmp_path, disk_calls):
    path = tmp_path / "folder" / "report.md"
    path.parent.mkdir()
    for text in ("before", "and after"):
        disk_calls.clear()
        write_text(path, text)
        assert disk_calls == ["fsync report.md.partial", "rename report.md.partial report.md", "fsync folder"]
        assert disk_calls.synced["report.md.partial"] == len(text)


def test_a_file_that_a_library_writes_is_on_disk_before_it_gets_its_name(tmp_path, disk_calls):
    with atomic_replace(tmp_path / "model.gguf") as partial:
        partial.write_bytes(b"weights")
    assert disk_calls[:2] == ["fsync model.gguf.partial", "rename model.gguf.partial model.gguf"]
    assert disk_calls.synced["model.gguf.partial"] == 7 and disk_calls[2:] == [f"fsync {tmp_path.name}"]


def test_what_is_flushed_is_all_that_was_written(tmp_path, disk_calls):
    with (tmp_path / "file").open("wb") as file:
        file.write(b"in the buffer")
        flush(file)
    assert disk_calls.synced == {"file": 13}


def test_an_append_is_on_disk_when_it_returns(tmp_path, disk_calls):
    for content, size in ((b"one\n", 4), (b"three\n", 10)):
        append(tmp_path / "history.jsonl", content)
        assert disk_calls.synced == {"history.jsonl": size}


def test_a_file_is_read_from_any_position_in_pieces(tmp_path, monkeypatch):
    content = bytes(range(200))
    (tmp_path / "file").write_bytes(content)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, position: pread(file, min(size, 7), position))
    file = PositionalFile(tmp_path / "file")
    for start, size in ((0, 200), (13, 40), (190, 50), (200, 1), (5, 0)):
        assert file.read(start, size) == content[start : start + size]


def test_the_partial_file_of_a_killed_process_is_overwritten(tmp_path):
    (tmp_path / "report.md.partial").write_text("half of")
    write_text(tmp_path / "report.md", "complete")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("report.md", "complete")]


def test_a_symlink_in_place_of_the_partial_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "report.md.partial").symlink_to(tmp_path / "precious")
    write_text(tmp_path / "report.md", "report")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "report.md").read_text() == "report"


def test_json_with_a_checksum_is_read_back_as_written(tmp_path):
    content = {"step": 3, "loss": 0.1 + 0.2, "name": "cucafera ç", "inner": {"list": [1, None, True]}}
    write_json_with_checksum(tmp_path / "file.json", content)
    assert read_json_with_checksum(tmp_path / "file.json") == content
    assert json.loads((tmp_path / "file.json").read_text())["step"] == 3


def test_every_flipped_bit_and_truncation_of_json_with_a_checksum_is_detected(tmp_path):
    path = tmp_path / "file.json"
    content = {"step": 3, "loss": 4.853180408477783, "sha256": "8f" * 32}
    write_json_with_checksum(path, content)
    written = path.read_bytes()
    for position in range(len(written)):
        for bit in range(8):
            changed = bytearray(written)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(ChecksumError):
                read_json_with_checksum(path)
    for length in range(len(written)):
        path.write_bytes(written[:length])
        with pytest.raises(ChecksumError):
            read_json_with_checksum(path)


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"null", b"\xff\xfe", random.Random(0).randbytes(100)])
def test_a_file_without_a_valid_checksum_is_refused(tmp_path, content):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ChecksumError):
        read_json_with_checksum(tmp_path / "file.json")


def test_an_append_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "history.jsonl"
    append(path, b"one\n")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        append(path, b"two\n")
    assert path.read_bytes() == b"one\n"


def test_a_line_is_appended_after_a_newline_if_the_last_line_has_none(tmp_path):
    path = tmp_path / "rows.jsonl"
    for line in ("one", "two"):
        append_line(path, line)
    assert path.read_text() == "one\ntwo\n"
    path.write_text("one\ntw")
    append_line(path, "três")
    assert path.read_text(encoding="utf-8") == "one\ntw\ntrês\n"


def test_an_append_does_not_follow_a_symlink(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "history.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):
        append(tmp_path / "history.jsonl", b"line\n")
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_log_is_not_written_through_a_symlink(tmp_path):
    log, other = tmp_path / "run.log", tmp_path / "other"
    other.write_text("theirs")
    log.symlink_to(other)
    handler = RunLog(log, delay=True)
    with pytest.raises(OSError, match=r"it is a symlink, which is not followed"):
        handler.emit(logging.makeLogRecord({"msg": "ours"}))
    assert other.read_text() == "theirs"
    log.unlink()
    handler.emit(logging.makeLogRecord({"msg": "català"}))
    handler.close()
    assert log.read_text(encoding="utf-8") == "català\n"


@pytest.mark.parametrize(
    "use", [read_small_file, PositionalFile, lambda path: append(path, b"x"), lambda path: append_line(path, "x")]
)
def test_a_pipe_is_neither_read_nor_written(tmp_path, use):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe"):
        use(tmp_path / "pipe")


def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path):
    assert list_folder(tmp_path / "nowhere") == []
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for name, reason in (("link", "it is a symlink to .*nowhere, which is not there"), ("file", "Not a directory")):
        with pytest.raises(OSError, match=reason):
            list_folder(tmp_path / name)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a": "\\ud800"}', b"1" * 10_000, b"\xff"])
def test_json_that_cannot_be_used_is_one_kind_of_error(content):
    with pytest.raises(ValueError, match=r"."):
        parse_json(content)
