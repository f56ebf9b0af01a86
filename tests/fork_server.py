"""A server that forks commands from a process with the imports done; most of a small run's time is imports.

    python tests/fork_server.py SOCKET

The test session starts one (conftest.py) and tests/support.py connects to it. The imports are made when the first
command is asked for. A connection stands for one command: the client sends how it starts, with its stdin, stdout and
stderr; the server answers with its process number, and when it has ended with its status. The command is a grandchild
of the server, and ends as any interpreter does: threads joined, exit functions called, status by exit or by signal.

It differs from an interpreter of its own in one thing: all commands have the same hash seed. The server ends when its
stdin does, that is, with the session.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

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
    for descriptor, standard in zip(descriptors, range(3), strict=True):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    return request


def run(request: dict[str, Any]) -> None:
    """Become a new interpreter's `python ARGUMENTS`: `-m MODULE ...` or `PROGRAM ...`."""
    for number in DEFAULT_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    if request["new_session"]:
        os.setsid()
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
    if arguments[0] == "-m":
        sys.argv = ["", *arguments[2:]]
        sys.path.insert(0, request["cwd"])
        sys.modules.pop(arguments[1], None)  # it is __main__
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1])
