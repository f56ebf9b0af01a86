"""Folders that are created once, atomically."""

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from cucafera.data.prepared import SUMMARY, PreparedDataError, prepare_once
from cucafera.storage import write_json_with_checksum


def test_a_symlink_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "tokens.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(PreparedDataError, match="cannot write prepared tokens"):
        prepare_once("source", tmp_path / "tokens", lambda folder: folder.mkdir())
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_complete_folder_is_found_where_nothing_can_be_written(tmp_path, monkeypatch):
    folder = tmp_path / "prepared" / "tokens"
    (folder.with_name("tokens.lock")).mkdir(parents=True)  # a lock that cannot be created
    with pytest.raises(PreparedDataError, match=r"cannot write prepared tokens to .*data\.prepared_dir"):
        prepare_once("source", folder, lambda folder: pytest.fail())
    folder.mkdir()
    write_json_with_checksum(folder / SUMMARY, {"tokens": 7})

    def read_only(*arguments: object, **settings: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert prepare_once("source", folder, lambda folder: pytest.fail()) == {"tokens": 7}
    with pytest.raises(PreparedDataError, match=r"other: Read-only file system; set data\.prepared_dir"):
        prepare_once("source", tmp_path / "prepared" / "other", lambda folder: pytest.fail())


def test_a_summary_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "tokens" / SUMMARY).mkdir(parents=True)
    with pytest.raises(PreparedDataError, match=r"tokens/prepared\.json cannot be read: it is a folder"):
        prepare_once("source", tmp_path / "tokens", lambda folder: pytest.fail())


def prepare(folder, started, filled) -> None:
    def fill(partial) -> None:
        started.set()
        time.sleep(0.3)
        partial.mkdir()
        with filled.get_lock():
            filled.value += 1
        write_json_with_checksum(partial / SUMMARY, {"tokens": 7})

    assert prepare_once("source", folder, fill) == {"tokens": 7}


def test_of_several_processes_one_prepares_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    started, filled = context.Event(), context.Value("i", 0)
    processes = [context.Process(target=prepare, args=(tmp_path / "tokens", started, filled)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert filled.value == 1


def test_a_folder_left_by_a_killed_process_is_prepared_again(tmp_path):
    context = multiprocessing.get_context("fork")
    started, filled = context.Event(), context.Value("i", 0)
    killed = context.Process(target=prepare, args=(tmp_path / "tokens", started, filled))
    killed.start()
    started.wait(60)
    killed.kill()
    killed.join()
    prepare(tmp_path / "tokens", started, filled)
    assert filled.value == 1


def test_nothing_that_a_killed_process_has_left_is_in_the_prepared_folder(tmp_path):
    left = tmp_path / "tokens.partial"
    left.mkdir()
    (left / "half of a shard").touch()

    def fill(partial) -> None:
        partial.mkdir()
        write_json_with_checksum(partial / SUMMARY, {"tokens": 7})

    assert prepare_once("source", tmp_path / "tokens", fill) == {"tokens": 7}
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == [SUMMARY] and not left.exists()


def test_a_folder_that_could_not_be_filled_leaves_nothing(tmp_path):
    def fail(partial) -> None:
        partial.mkdir()
        (partial / "half of a shard").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_once("source", tmp_path / "tokens", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.lock"]
