"""One process at a time on a run folder."""

import errno
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
from collections.abc import Callable
from pathlib import Path

import pytest

from cucafera.config.errors import UserError
from cucafera.runs import lock as lock_module
from cucafera.runs.lock import run_lock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "lock"


def no_locks(*arguments):
    raise OSError(37, "No locks available")


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_lock_file_names_its_owner_and_is_removed_by_it(path):
    with run_lock(path):
        owner = json.loads(path.read_text())
        assert (owner["host"], owner["pid"]) == (socket.gethostname(), os.getpid())
    assert not path.exists()


def test_a_second_process_is_refused_with_the_owner_of_the_lock(path):
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
from cucafera.runs.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    if len(sys.argv) > 2 and not os.fork():
        time.sleep(1)  # like a data loader worker, which notices the death of its parent late
        os._exit(0)
    time.sleep(60)
"""


@pytest.mark.parametrize("workers", [[], ["with a worker"]])
def test_the_lock_of_a_killed_process_is_taken_over(path, workers, caplog):
    caplog.set_level("INFO")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, path, *workers], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"is in use by process {holder.pid}"), run_lock(path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert path.exists()
    with run_lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert f"is taken over from process {holder.pid}" in caplog.text


def test_without_system_locks_a_living_owner_on_this_machine_is_found_by_its_pid(path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    path.parent.mkdir()
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getppid(), "user": "u", "since": "s"}))
    with pytest.raises(UserError, match=f"is in use by process {os.getppid()}"), run_lock(path):
        pass
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": dead_pid()}))
    with run_lock(path):
        pass


@pytest.fixture
def fast_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock_module, "SILENT_SECONDS", 0.5)


def test_an_owner_on_another_machine_whose_heart_beats_is_refused(path, monkeypatch, fast_heartbeat):
    """The disk has no locks, or each machine its own: only the time of change of the file is seen by both."""
    path.parent.mkdir()
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "user": "u", "since": "s"}))
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            os.utime(path)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(UserError, match="in use by process 7 of u on elsewhere"), run_lock(path):
            pass
        monkeypatch.setattr(fcntl, "flock", no_locks)
        with pytest.raises(UserError, match="in use by process 7 of u on elsewhere"), run_lock(path):
            pass
    finally:
        stop.set()
        beating.join()


def test_a_silent_owner_on_another_machine_is_taken_over(path, caplog, fast_heartbeat):
    caplog.set_level("INFO")
    path.parent.mkdir()
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "user": "u", "since": "s"}))
    with run_lock(path):
        assert json.loads(path.read_text())["host"] == socket.gethostname()
    assert "is taken over from process 7 on elsewhere, which has died" in caplog.text


def test_an_owner_whose_file_vanishes_while_its_heartbeat_is_waited_for_has_ended(path, fast_heartbeat):
    path.parent.mkdir()
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "user": "u", "since": "s"}))
    ended = threading.Timer(0.1, path.unlink)
    ended.start()
    with run_lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    ended.join()


@pytest.mark.parametrize(
    ("owner", "error", "is_dead"),
    [
        ({"host": socket.gethostname(), "pid": 7}, None, False),
        ({"host": socket.gethostname(), "pid": 7}, PermissionError, False),  # of another user
        ({"host": socket.gethostname(), "pid": 7}, ProcessLookupError, True),
        ({"host": "elsewhere", "pid": 7}, ProcessLookupError, False),  # its processes are not seen here
        ({}, ProcessLookupError, False),
    ],
)
def test_an_owner_is_dead_only_if_this_machine_has_no_such_process(monkeypatch, owner, error, is_dead):
    def kill(pid: int, number: int) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(os, "kill", kill)
    assert lock_module._is_dead(owner) is is_dead


def test_a_lock_whose_owner_cannot_be_named_is_released(path):
    path.mkdir(parents=True)  # a folder in the place of the file
    with pytest.raises(UserError, match="lock cannot be written") as refused, run_lock(path):
        pass
    path.rmdir()
    with run_lock(path):
        assert refused.tb is not None  # it keeps the lock from being collected, which would release it


def test_the_owner_of_a_lock_touches_its_file(path, fast_heartbeat):
    with run_lock(path):
        os.utime(path, (1, 1))
        wait_until(lambda: path.stat().st_mtime > 1)


def test_a_process_whose_run_was_taken_over_exits_at_once(path, monkeypatch, fast_heartbeat):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with run_lock(path):
        path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "user": "u", "since": "s"}))
        wait_until(lambda: codes)
    assert codes[0] == 2
    assert path.exists()  # it is the other one's


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_lock_file_left_on_a_disk_without_locks_does_not_block(path, monkeypatch, error, caplog):
    with run_lock(path):
        pass

    def refuse(*arguments: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_lock(path):
        assert "do not start this run on two machines at once" in caplog.text


@pytest.mark.parametrize("content", [b"", b"half of", b"[]", b"\xff"])
def test_a_damaged_lock_file_without_an_owner_is_replaced(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with run_lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_symlink_in_place_of_the_lock_is_not_followed(path, tmp_path):
    path.parent.mkdir()
    (tmp_path / "precious").write_text("precious")
    for name in ("lock", ".lock"):
        path.with_name(name).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot be written: Too many levels of symbolic links"), run_lock(path):
        pass
    path.with_name(".lock").unlink()
    with run_lock(path):
        assert not path.is_symlink()
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_folder_that_cannot_be_written_is_refused_in_a_sentence(path, monkeypatch):
    def read_only(*arguments, **settings):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "open", read_only)
    for _ in range(2):  # and the lock is not left held
        with pytest.raises(UserError, match="lock cannot be written: Read-only file system"), run_lock(path):
            pass
    monkeypatch.undo()
    with run_lock(path):
        pass


def _take(path: Path, taken, times, start) -> None:
    start.wait()
    for _ in range(50):
        try:
            with run_lock(path):
                with taken.get_lock():
                    taken.value += 1
                    times.value += 1
                assert taken.value == 1
                with taken.get_lock():
                    taken.value -= 1
        except UserError:
            continue


def test_concurrent_processes_never_hold_the_lock_together(path):
    context = multiprocessing.get_context("fork")
    taken, times, start = context.Value("i", 0), context.Value("i", 0), context.Event()
    processes = [context.Process(target=_take, args=(path, taken, times, start)) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert times.value > 4
