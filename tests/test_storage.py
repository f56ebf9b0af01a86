"""Atomic writes, checksums, and symlinks that are not followed."""

import errno
import json
import os
import random

import pytest

from cucafera.storage import (
    ChecksumError,
    append,
    atomic_write,
    read_json_with_checksum,
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


def test_an_append_does_not_follow_a_symlink(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "history.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):
        append(tmp_path / "history.jsonl", b"line\n")
    assert (tmp_path / "precious").read_text() == "precious"
