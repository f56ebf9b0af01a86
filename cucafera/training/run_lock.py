"""One process at a time works on a run folder."""

import errno
import fcntl
import json
import logging
import os
import pwd
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from cucafera.config import EXIT_USER_ERROR, UserError
from cucafera.data.files import descriptor_of

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 15.0
SILENT_SECONDS = 60.0
"""An owner on another machine that has not touched the lock for so long is dead."""


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Holds a run folder's lock; its file says who does.

    The operating system gives the lock of a dead process back at once. Where folders are shared between machines whose
    systems do not share locks, the owner's heartbeat, the file's time of change, tells whether it lives. One that was
    asleep for so long that it was taken over ends at once when it wakes: two must not write into the same folder.

    Args:
        path: The lock file; it is there as long as the lock is held.

    Raises:
        UserError: another process holds the lock, or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, owner = _acquired(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    stop = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, owner, stop), name="run lock", daemon=True)
    heart.start()
    try:
        yield
    finally:
        stop.set()
        heart.join()
        if _is_of(path, owner):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquired(path: Path) -> tuple[int, bytes]:
    """Takes the lock. Returns the descriptor of its file, which holds it, and what that says of the owner."""
    while True:
        descriptor = descriptor_of(path, os.O_RDWR)
        try:
            locks = _locked(descriptor, path)
            if not (_is(descriptor, path) and _is_silent(descriptor, path, locks)):  # its owner has just removed it
                os.close(descriptor)
                continue
            facts = {"host": socket.gethostname(), "pid": os.getpid(), "user": _user(), "since": _now()}
            owner = json.dumps(facts).encode()
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, owner, 0)
            return descriptor, owner
        except BaseException:
            os.close(descriptor)
            raise


def _locked(descriptor: int, path: Path) -> bool:
    """Takes the system's lock. Returns False where the disk has none; raises UserError if another process has it."""
    until = time.monotonic() + SILENT_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError as error:
            owner = _owner(descriptor)
            # The readers of a killed process hold its lock until they notice, some seconds later.
            orphans = owner.get("host") == socket.gethostname() and not _lives(owner.get("pid"))
            if not orphans or time.monotonic() > until:
                raise _in_use(path, owner) from error
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            return False


def _is_silent(descriptor: int, path: Path, locks: bool) -> bool:
    """Waits for a sign of life of an owner on another machine.

    Returns:
        True if there is none, or no owner; False if it has removed the file.

    Raises:
        UserError: the owner lives.
    """
    owner = _owner(descriptor)
    if not owner:
        return True
    dead = "is taken over from process {pid} on {host}, which has died"
    if owner.get("host") == socket.gethostname():
        if not locks and _lives(owner.get("pid")):
            raise _in_use(path, owner)
        log.info("%s %s", path.parent, dead.format_map(owner))
        return True
    last_beat = os.fstat(descriptor).st_mtime_ns
    log.info(
        "%s was in use by process %s on %s: waiting up to %.0f seconds for a sign of life",
        path.parent, owner.get("pid"), owner.get("host"), SILENT_SECONDS,
    )  # fmt: skip
    waited_since = time.monotonic()
    while time.monotonic() - waited_since < SILENT_SECONDS:
        time.sleep(min(1.0, SILENT_SECONDS / 10))
        if not _is(descriptor, path):
            return False
        if os.fstat(descriptor).st_mtime_ns != last_beat:
            raise _in_use(path, owner)
    log.info("%s %s", path.parent, dead.format_map(owner))
    return True


def _in_use(path: Path, owner: dict[str, Any]) -> UserError:
    who = "another process"
    if owner:
        who = f"process {owner.get('pid')} of {owner.get('user')} on {owner.get('host')}, since {owner.get('since')}"
    return UserError(
        f"{path.parent} is in use by {who}. Wait for it or stop it (SIGTERM saves first), or choose another name=..."
    )


def _owner(descriptor: int) -> dict[str, Any]:
    """What the lock's file says; nothing if it is empty or damaged."""
    try:
        owner = json.loads(os.pread(descriptor, 10_000, 0))
    except ValueError:
        return {}
    return {"pid": None, "host": None} | owner if isinstance(owner, dict) else {}


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lives(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _beat(path: Path, owner: bytes, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        try:
            if not _is_of(path, owner):
                log.error("%s: another process has taken this run over; this one ends, and saves nothing", path)
                _end_at_once()
            os.utime(path)
        except OSError as error:
            log.warning("%s: %s", path, error.strerror or error)


def _is_of(path: Path, owner: bytes) -> bool:
    """Whether the lock's file still says so; if it is gone, nobody else has it."""
    try:
        return path.read_bytes() == owner
    except FileNotFoundError:
        return True


def _end_at_once() -> None:
    os._exit(EXIT_USER_ERROR)


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run as a user without a name
        return str(os.getuid())


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
