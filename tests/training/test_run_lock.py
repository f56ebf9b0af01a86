"""One process at a time on a run folder."""

import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cucafera.config import UserError
from cucafera.training import run_lock as module
from cucafera.training.run_lock import run_lock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "lock"


def no_locks(*arguments):
    raise OSError(37, "No locks available")


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_lock_says_who_holds_it_and_goes_with_its_owner(path):
    with run_lock(path):
        owner = json.loads(path.read_text())
        assert (owner["host"], owner["pid"]) == (socket.gethostname(), os.getpid())
    assert not path.exists()


def test_a_second_owner_is_refused_with_the_name_of_the_first(path):
    with (
        run_lock(path),
        pytest.raises(UserError, match=rf"is in use by process {os.getpid()} of \S+ on \S+, since 2"),
        run_lock(path),
    ):
        pass
    with run_lock(path):
        pass


HOLDER = """
import os, signal, sys, time
from pathlib import Path
from cucafera.training.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    if len(sys.argv) > 2 and not os.fork():
        time.sleep(1)  # as a reader, which notices the end of its parent late
        os._exit(0)
    time.sleep(60)
"""


@pytest.mark.parametrize("readers", [[], ["with a reader"]])
def test_the_lock_of_a_killed_process_is_taken_over(path, readers, caplog):
    caplog.set_level("INFO")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, path, *readers], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"is in use by process {holder.pid}"), run_lock(path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert path.exists()
    with run_lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert f"is taken over from process {holder.pid}" in caplog.text


def test_without_locks_of_the_system_a_living_process_of_this_machine_is_found_by_its_number(path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    path.parent.mkdir()
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid(), "user": "u", "since": "s"}))
    with pytest.raises(UserError, match=f"is in use by process {os.getppid()}"), run_lock(path):
        pass
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": dead_pid()}))
    with run_lock(path):
        pass


def test_an_owner_on_another_machine_is_dead_when_its_heart_stands_still(path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.3)
    path.parent.mkdir()
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    with run_lock(path):
        pass
    assert "was in use by process 7 on elsewhere: waiting" in caplog.text
    assert "taken over from process 7 on elsewhere" in caplog.text


def test_an_owner_on_another_machine_whose_heart_beats_is_not_disturbed(path, monkeypatch):
    monkeypatch.setattr(module, "SILENT_SECONDS", 5.0)
    path.parent.mkdir()
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "user": "u", "since": "s"}))
    threading.Timer(0.3, lambda: os.utime(path)).start()
    with pytest.raises(UserError, match="is in use by process 7 of u on elsewhere"), run_lock(path):
        pass


def test_an_owner_on_another_machine_that_ends_while_it_is_waited_for_leaves_the_lock(path, monkeypatch):
    monkeypatch.setattr(module, "SILENT_SECONDS", 5.0)
    path.parent.mkdir()
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    threading.Timer(0.3, path.unlink).start()
    with run_lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_the_heart_beats_while_the_lock_is_held(path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.02)
    with run_lock(path):
        first = path.stat().st_mtime_ns
        deadline = time.monotonic() + 5
        while path.stat().st_mtime_ns == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_an_owner_that_slept_and_was_taken_over_ends_and_leaves_the_lock_to_the_other(path, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(module, "_end_at_once", ended.set)
    with run_lock(path):
        path.write_text("another")
        assert ended.wait(5)
    assert path.read_text() == "another"


@pytest.mark.parametrize("content", [b"", b"half of", b"[]", b"\xff"])
def test_a_damaged_lock_file_that_nobody_holds_is_taken(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with run_lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_link_under_the_name_of_the_lock_is_not_followed(path, tmp_path):
    path.parent.mkdir()
    (tmp_path / "precious").write_text("precious")
    path.symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot be written"), run_lock(path):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def _take(path: Path, taken, begin) -> None:
    begin.wait()
    for _ in range(50):
        try:
            with run_lock(path):
                with taken.get_lock():
                    taken.value += 1
                assert taken.value == 1
                with taken.get_lock():
                    taken.value -= 1
        except UserError:
            continue


def test_processes_that_want_the_lock_at_once_never_hold_it_together(path):
    context = multiprocessing.get_context("fork")
    taken, begin = context.Value("i", 0), context.Event()
    processes = [context.Process(target=_take, args=(path, taken, begin)) for _ in range(4)]
    for process in processes:
        process.start()
    begin.set()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
