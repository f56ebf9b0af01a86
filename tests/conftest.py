"""Fixtures of all tests: a small corpus, a small run, a base model and a chat model."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from cucafera.run import train
from tests.support import (
    FORK_SERVER,
    ONE_THREAD,
    ROOT,
    Command,
    DiskCalls,
    compose_small_chat,
    compose_small_run,
    write_corpus,
)

DEFAULT_HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    **dict.fromkeys((signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM, signal.SIGTSTP), signal.SIG_DFL),
}
"""Of signals that nohup, say, ignores in what it starts: the commands of the tests would inherit that."""
LONGEST_TEST = "test_the_small_version_runs_on_a_cpu_without_datasets"

torch.set_num_threads(1)  # for models this small, threads only get in each other's way


def pytest_configure(config: pytest.Config) -> None:
    """Start the fork server, once for all workers."""
    for number, default in DEFAULT_HANDLERS.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, default)
    if hasattr(config, "workerinput"):
        return
    # What a test starts imports this checkout too, and not another one that is installed.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    folder = tempfile.TemporaryDirectory(prefix="cucafera-tests-")
    os.environ[FORK_SERVER] = f"{folder.name}/socket"
    program = Path(__file__).parent / "fork_server.py"
    server = subprocess.Popen(
        [sys.executable, program, os.environ[FORK_SERVER]],
        stdin=subprocess.PIPE, env=os.environ | ONE_THREAD, process_group=0,
    )  # fmt: skip

    while not Path(os.environ[FORK_SERVER]).exists() and server.poll() is None:
        time.sleep(0.01)

    def stop() -> None:
        server.stdin.close()
        server.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # commands that a test has left
        folder.cleanup()

    config.add_cleanup(stop)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest test first: as one of the last it would leave all cores but one idle for minutes."""
    items.sort(key=lambda item: item.name != LONGEST_TEST)


@pytest.fixture
def disk_calls(monkeypatch: pytest.MonkeyPatch) -> DiskCalls:
    """The system calls on files, from here on."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc of Linux")
    return DiskCalls(monkeypatch)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A jsonl file of 80 short documents."""
    path = tmp_path / "corpus.jsonl"
    write_corpus(path, documents=80)
    return path


@pytest.fixture
def command(corpus: Path, tmp_path: Path) -> Command:
    """`python -m cucafera.run` on the small run, in the test's own folder."""
    return Command(corpus, tmp_path)


@pytest.fixture
def small_run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Composes the small run with further overrides; its run folder is outputs/NAME below the test's own folder."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(compose_small_run, corpus)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model in outputs/base and a chat model in outputs/chat, of twelve steps; context 128."""
    folder = tmp_path_factory.mktemp("runs")
    before = Path.cwd()
    os.chdir(folder)
    try:
        corpus = folder / "corpus.jsonl"
        write_corpus(corpus, documents=80)
        shown = "callbacks.prompts=[la mar,el sol]"
        train(compose_small_run(corpus, "name=base", "model.max_position_embeddings=128", shown), [])
        train(compose_small_chat(folder, "name=chat", "init_from=outputs/base", "optimizer.lr=1e-2"), [])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def small_chat(small_run, tmp_path: Path):
    """Composes a small finetuning run with further overrides, on conversations that the test makes."""
    return functools.partial(compose_small_chat, tmp_path)
