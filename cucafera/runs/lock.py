"""One process at a time works on a run folder."""

import contextlib
import errno
import getpass
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cucafera.config.errors import EXIT_USER_ERROR, UserError
from cucafera.runs.shape import shape_problem
from cucafera.storage import parse_json, read_small_file

log = logging.getLogger(__name__)

LOCK = "lock"
"""The file that names the process that works on a run folder."""
OWNER = {"host": str, "pid": int}
"""Shape of the owner's file."""
ORPHAN_SECONDS = 60.0
"""Longest wait for the child processes of a killed owner, which may hold its lock until they notice that it is dead."""
HEARTBEAT_SECONDS = 15.0
"""Time between two touches of the owner's file."""
SILENT_SECONDS = 60.0
"""An owner on another machine that has not touched its file for this long is dead."""
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of a disk that has no locks, such as NFS without its lock service."""


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a run folder.

    The operating system's lock on the hidden file next to `path` keeps other processes out: it is released when its
    owner dies, however it dies. `path` names the owner, for the message to the others. Where machines share a disk and
    not its locks, the owner's heartbeat, the time of change of `path`, shows if it lives. A process that slept so long
    that its run was taken over exits at once when it wakes: two must not write into the same folder.

    Args:
        path: The file that names the owner, in JSON; it exists as long as the lock is held, or its owner was killed.

    Raises:
        UserError: another process holds the lock, or the folder cannot be written.
    """
    lock = FileLock(path.with_name(f".{path.name}"), fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, path)
        earlier = _read_owner(path)
        if earlier:
            _wait_for_heartbeat(path, earlier)
            log.info(
                "%s is taken over from process %s on %s, which has died", path.parent, earlier["pid"], earlier["host"]
            )
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "user": _user(), "since": _now()}
        path.unlink(missing_ok=True)
        with path.open("x") as file:  # "x" is O_CREAT | O_EXCL: never follow an existing symlink
            file.write(json.dumps(owner) + "\n")
    except OSError as error:
        lock.release()
        raise UserError(f"{error.filename or path} cannot be written: {error.strerror or error}") from error
    except BaseException:
        lock.release()
        raise
    stop = threading.Event()
    heartbeat = threading.Thread(target=_beat, args=(path, owner, stop), name="run lock", daemon=True)
    try:
        heartbeat.start()
    except RuntimeError as error:
        log.warning("%s: without a heartbeat, another machine may take this run over: %s", path.parent, error)
    try:
        yield
    finally:
        stop.set()
        if heartbeat.is_alive():
            heartbeat.join()
        with contextlib.suppress(OSError):  # a disk that is away
            if _read_owner(path) == owner:
                path.unlink(missing_ok=True)
        lock.release()


def _beat(path: Path, owner: dict[str, Any], stop: threading.Event) -> None:
    """Touch the owner's file until `stop` is set; exit the process if the run was taken over."""
    while not stop.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):  # a disk that is away for a moment
            now = _read_owner(path)
            if now and now != owner:
                log.error("%s was taken over by process %s on %s: stopping", path.parent, now["pid"], now["host"])
                os._exit(EXIT_USER_ERROR)
            os.utime(path)


def _wait_for_heartbeat(path: Path, owner: dict[str, Any]) -> None:
    """Raise UserError if an owner on another machine lives. Clocks of two machines are not compared."""
    if owner["host"] == socket.gethostname():
        return
    log.info(
        "%s was in use by process %s on %s: waiting up to %.0f seconds for a sign of life",
        path.parent, owner["pid"], owner["host"], SILENT_SECONDS,
    )  # fmt: skip
    deadline = time.monotonic() + SILENT_SECONDS
    with contextlib.suppress(FileNotFoundError):  # it has ended
        seen = path.stat().st_mtime_ns
        while time.monotonic() < deadline:
            time.sleep(min(1.0, SILENT_SECONDS / 10))
            if path.stat().st_mtime_ns != seen:
                raise _in_use(path, owner)


def _acquire(lock: FileLock, path: Path) -> None:
    """Acquire the lock at once, or raise UserError; see `run_lock`."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while True:
        try:
            lock.acquire(timeout=0)
            return
        except Timeout as error:
            owner = _read_owner(path)
            if not _is_dead(owner) or time.monotonic() > deadline:
                raise _in_use(path, owner) from error
            time.sleep(0.1)
        except (OSError, NotImplementedError) as error:  # filelock reports ENOSYS as the latter
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            owner = _read_owner(path)
            if owner.get("host") == socket.gethostname() and not _is_dead(owner):
                raise _in_use(path, owner) from error
            log.warning("The disk of %s has no locks: do not start this run on two machines at once", path.parent)
            return


def _in_use(path: Path, owner: dict[str, Any]) -> UserError:
    who = "another process"
    if owner:
        who = f"process {owner['pid']} of {owner.get('user')} on {owner['host']}, since {owner.get('since')}"
    return UserError(
        f"{path.parent} is in use by {who}. Wait for it or stop it (SIGTERM saves first), or choose another name=..."
    )


def _read_owner(path: Path) -> dict[str, Any]:
    """Return what the file says about the owner; empty if it is missing or damaged."""
    try:
        owner = parse_json(read_small_file(path))
    except (FileNotFoundError, ValueError):
        return {}
    return owner if shape_problem(owner, OWNER) is None and owner["pid"] > 0 else {}


def _is_dead(owner: dict[str, Any]) -> bool:
    """True if the owner was a process of this machine that no longer exists."""
    if owner.get("host") != socket.gethostname():
        return False
    try:
        os.kill(owner["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # it exists, and belongs to another user
        return False
    return False


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user without a name
        return str(os.getuid())


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
