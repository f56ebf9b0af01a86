"""Files that are whole or not there."""

import errno
import json
import random

import pytest

from cucafera.data.files import NotAsWrittenError, read_sealed, write_sealed, write_text, written_whole


def test_a_file_that_cannot_be_written_to_its_end_leaves_the_one_before(tmp_path):
    path = tmp_path / "report.md"
    write_text(path, "before")
    with pytest.raises(OSError), written_whole(path) as file:
        file.write(b"half of")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"]


def test_what_a_killed_program_left_is_written_over(tmp_path):
    (tmp_path / "report.md.partial").write_text("half of")
    write_text(tmp_path / "report.md", "whole")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("report.md", "whole")]


def test_a_link_under_the_name_of_the_unfinished_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "report.md.partial").symlink_to(tmp_path / "precious")
    write_text(tmp_path / "report.md", "report")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "report.md").read_text() == "report"


def test_a_sealed_file_gives_back_what_was_written(tmp_path):
    content = {"step": 3, "loss": 0.1 + 0.2, "name": "cucafera ç", "inner": {"list": [1, None, True]}}
    write_sealed(tmp_path / "seal.json", content)
    assert read_sealed(tmp_path / "seal.json") == content
    assert json.loads((tmp_path / "seal.json").read_text())["step"] == 3


def test_every_flipped_bit_and_every_cut_of_a_sealed_file_is_noticed(tmp_path):
    path = tmp_path / "seal.json"
    content = {"step": 3, "loss": 4.853180408477783, "sha256": "8f" * 32}
    write_sealed(path, content)
    written = path.read_bytes()
    for place in range(len(written)):
        for bit in range(8):
            changed = bytearray(written)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(NotAsWrittenError):
                read_sealed(path)
    for length in range(len(written)):
        path.write_bytes(written[:length])
        with pytest.raises(NotAsWrittenError):
            read_sealed(path)


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"null", b"\xff\xfe", random.Random(0).randbytes(100)])
def test_what_is_no_sealed_file_is_refused(tmp_path, content):
    (tmp_path / "seal.json").write_bytes(content)
    with pytest.raises(NotAsWrittenError):
        read_sealed(tmp_path / "seal.json")
