"""Folders that are created once, atomically."""

import multiprocessing
import time

import pytest

from cucafera.data.prepared import SUMMARY, PreparedDataError, prepare_once
from cucafera.storage import write_json_with_checksum


def test_a_symlink_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "tokens.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(PreparedDataError, match="cannot write prepared tokens"):
        prepare_once("source", tmp_path / "tokens", lambda folder: folder.mkdir())
    assert (tmp_path / "precious").read_text() == "precious"


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
