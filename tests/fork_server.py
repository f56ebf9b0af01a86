"""A server that forks commands from a process with the imports done; most of a small run's time is imports.

    python tests/fork_server.py SOCKET

The test session starts one (conftest.py) and tests/support.py connects to it. The imports are made when the first
command is asked for. A connection stands for one command: the client sends how it starts, with its stdin, stdout and
stderr; the server answers with its process number, and when it has ended with its status. The command is a grandchild
of the server, and ends as any interpreter does: threads joined, exit functions called, status by exit or by signal.

It differs from an interpreter of its own in one thing: all commands have the same hash seed. The server ends when its
stdin does, that is, with the session.

What a command starts as `python ...` (the jobs of a sweep, the processes of other devices, those of torchrun) is forked
too: see `Nursery`.
"""

import _posixsubprocess
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import pickle
import pkgutil
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
"""Option of prctl(2), on Linux: orphaned descendants of this process become its children."""
REQUEST_BYTES = 1 << 17
"""Bytes of the largest request to a nursery: command line and environment."""
PYTHONPATH = os.environ.get("PYTHONPATH", "")
"""That of the server, from which it imports."""
DEFAULT_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGCHLD)


def main(path: str) -> None:
    """Listen; in a forked process, become the command that a client asked for."""
    sys.path.pop(0)  # the tests, as the folder of this file
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    is_ready = False
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if not is_ready:
            is_ready = True
            import_package()
        if os.fork() == 0:
            listener.close()
            request = start(connection)
            if request is None:
                os._exit(0)
            return run(request)
        connection.close()
        reap()
    reap()
    return None


def reap() -> None:
    """Wait for the processes that have ended, so that their CPU time counts as that of the session."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def import_package() -> None:
    """Import all of the package, except for what needs a library that is not installed."""
    import cucafera

    for module in pkgutil.walk_packages(cucafera.__path__, "cucafera."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    if sys.platform == "linux":
        threads = sorted(Path("/proc/self/task").iterdir(), key=lambda thread: int(thread.name))[1:]
        names = {(thread / "comm").read_text().strip() for thread in threads}
        # A fork copies one thread only, and locks that others hold stay locked. jemalloc (in pyarrow) takes care of it.
        assert names <= {"jemalloc_bg_thd"}, f"the imports start threads: {names}"
    gc.freeze()  # a collection in a command would copy every page


def start(connection: socket.socket) -> Any:
    """Fork a command and report on it; return its request in the command, and None after its end."""
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(connection.makefile().readline())
    if process := os.fork():
        connection.sendall(struct.pack("i", process))
        for descriptor in descriptors:
            os.close(descriptor)
        _, status = os.waitpid(process, 0)
        with contextlib.suppress(OSError):  # a test that failed does not wait for it
            connection.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))
        return None
    connection.close()
    return request | {"descriptors": descriptors, "numbers": [0, 1, 2]}


class Nursery:
    """A child of a command that forks what the command starts as `python ...`.

    It is forked before the command does anything, and so in the state in which an interpreter starts. It replaces the
    system call behind `subprocess` and `multiprocessing`; what it forks becomes a child of the command, as after that
    call. Other programs, interpreters with options, and those that would not import this checkout, start as ever.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.fork_exec = _posixsubprocess.fork_exec
        self.set_option = ctypes.CDLL(None).prctl

    def open(self, numbers: Sequence[int]) -> Any:
        """Return None in the command, and the request in a process that it starts later.

        Args:
            numbers: Descriptors of the command, which the nursery closes.
        """
        self.socket, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = os.getpid()
        if os.fork():
            ours.close()
            _posixsubprocess.fork_exec = subprocess._fork_exec = self.start
            return None
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())  # those to its process group
        self.socket.close()
        null = os.open(os.devnull, os.O_RDWR)
        for number in numbers:
            os.dup2(null, number) if number <= 2 else os.close(number)
        while True:
            message, descriptors, _, _ = socket.recv_fds(ours, REQUEST_BYTES, 64)
            if not message:  # the command has ended
                os._exit(0)
            if process := os.fork():
                for descriptor in descriptors:
                    os.close(descriptor)
                os.waitpid(process, 0)
            elif os.fork():
                os._exit(0)
            else:
                break
        while os.getppid() != command:  # the orphan is about to become its child
            time.sleep(0.0005)
        request = pickle.loads(message)
        if request["group"] >= 0:
            os.setpgid(0, request["group"])
        if request["new_session"]:
            os.setsid()
        if request["before"] is not None:
            request["before"]()
        ours.sendall(struct.pack("i", os.getpid()))
        ours.close()
        return request | {"descriptors": descriptors}

    def start(self, arguments: Sequence[Any], *others: Any) -> int:
        """Start a program and return its process number; the arguments are those of _posixsubprocess.fork_exec."""
        _, _, kept, folder, environment, stdin, _, _, stdout, _, stderr, _, errors, _, new_session, group = others[:16]
        words = [os.fsdecode(argument) for argument in arguments]
        variables = dict(os.environ)
        if environment is not None:
            variables = dict(os.fsdecode(assignment).split("=", 1) for assignment in environment)
        is_same = words[0] == sys.executable and variables.get("PYTHONPATH", "").endswith(PYTHONPATH)
        if not is_same or not (command := without_options(words[1:])):
            return int(self.fork_exec(arguments, *others))
        kept = [descriptor for descriptor in kept if descriptor > 2 and descriptor != errors]
        request = {
            "arguments": command,
            "cwd": os.fsdecode(folder) if folder else str(Path.cwd()),
            "env": variables,
            "new_session": new_session,
            "group": group,
            "ignored": [number for number in DEFAULT_SIGNALS if signal.getsignal(number) is signal.SIG_IGN],
            "before": others[20],
            "numbers": [0, 1, 2, *kept],
        }
        given = [number if number >= 0 else standard for standard, number in enumerate((stdin, stdout, stderr))]
        with self.lock:
            self.set_option(PR_SET_CHILD_SUBREAPER, 1)
            try:
                socket.send_fds(self.socket, [pickle.dumps(request)], [*given, *kept])
                return int(struct.unpack("i", self.socket.recv(4))[0])
            finally:
                self.set_option(PR_SET_CHILD_SUBREAPER, 0)


def without_options(arguments: list[str]) -> list[str]:
    """Return what an interpreter is to run; nothing if it has options of its own, other than for unbuffered output."""
    ours = subprocess._args_from_interpreter_flags()  # which multiprocessing passes on
    if arguments[: len(ours)] == ours:
        arguments = arguments[len(ours) :]
    if arguments[:1] == ["-u"]:
        arguments = arguments[1:]
    return arguments if arguments and (arguments[0] in ("-m", "-c") or arguments[0][0] != "-") else []


def take_descriptors(request: dict[str, Any]) -> list[int]:
    """Give the descriptors of a request the numbers that they are to have, and return these."""
    numbers = request["numbers"]
    above = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 256) for descriptor in request["descriptors"]]
    for descriptor in request["descriptors"]:
        os.close(descriptor)
    for descriptor, number in zip(above, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    return numbers


def read_rank() -> None:
    """Read the rank of the process from the environment, as Lightning does when it is imported."""
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

    rank_zero_only.rank = _get_rank() or 0


def search_added_folders() -> None:
    """Let what the folders hold that were put before PYTHONPATH hide other modules; import their sitecustomize."""
    added = os.environ.get("PYTHONPATH", "").removesuffix(PYTHONPATH).split(os.pathsep)
    added = [folder for folder in added if folder and folder not in sys.path]
    sys.path[:0] = added
    for name in {path.stem for folder in added for path in Path(folder).glob("*")}:
        sys.modules.pop(name, None)
    if added:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module("sitecustomize")


def run(request: dict[str, Any]) -> None:
    """Become a new interpreter's `python ARGUMENTS`: `-m MODULE ...`, `-c CODE ...` or `PROGRAM ...`."""
    if request["new_session"]:
        os.setsid()
    take_descriptors(request)
    if sys.platform == "linux":
        while another := Nursery().open(request["numbers"]):
            request = another
            take_descriptors(request)
    for number in DEFAULT_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in request.get("ignored", ()):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    # New objects, since those of the server know whether its files are terminals and can be sought in.
    encoding = sys.stdout.encoding
    sys.stdin = os.fdopen(0, encoding=encoding, closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding=encoding, closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding, "backslashreplace", closefd=False)
    arguments = request["arguments"]
    sys.orig_argv = [sys.executable, *arguments]
    read_rank()
    search_added_folders()
    if arguments[0] == "-m":
        sys.argv = ["", *arguments[2:]]
        sys.path.insert(0, request["cwd"])
        sys.modules.pop(arguments[1], None)  # it is __main__
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = type(sys)("__main__")
        exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1])
