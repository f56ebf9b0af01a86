"""A job of a sweep: the same command as alone, in a process of its own.

So nothing of one job reaches another, neither random numbers nor compiled code nor memory, and several devices are
as good as one. Hydra's launchers decide where and when jobs run; here is what they run.
"""

import ctypes
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from cucafera.config import EXIT_DIVERGED, EXIT_OUT_OF_TIME, EXIT_USER_ERROR, Config
from cucafera.data.files import descriptor_of, write_text
from cucafera.training.run_folder import PLUMBING, RunFolder, flat, is_within

JOB = "job.json"
"""What is known of a job, in its folder."""
OUTPUT = "job.out"
"""What a job has printed, where it has no terminal."""
BESIDE_SWEEP = ("joblib", "parallel")
"""Launchers with processes of their own that end with the sweep; those of a cluster go on."""
PR_SET_PDEATHSIG = 1
"""Of prctl(2), on Linux: the signal that a process gets when its parent dies."""
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
INDIFFERENT = (*PLUMBING, "trainer")
"""Keys that change nothing in what comes out of a job."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What is known of a job.

    Attributes:
        status: finished, diverged (stopped by the guards, or worse than before training), refused (for something that
            the user can mend), stopped (by a signal, or max_time), crashed, or begun, and never ended.
        exit_code: Of its process; None while it has not ended.
        overrides: Its command line.
        identity: What its configuration comes to, hashed: see `identity_of`.
    """

    status: str
    exit_code: int | None
    overrides: list[str]
    identity: str | None

    @classmethod
    def read(cls, folder: Path) -> "Job | None":
        """What a job has left in its folder."""
        try:
            return cls(**json.loads((folder / JOB).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Leaves it there."""
        write_text(folder / JOB, json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def own_config_folders(hydra_config: Any) -> list[str]:
    """The folders of configuration files that the command line adds, of a resolved `hydra` node."""
    return [source.path for source in hydra_config.runtime.config_sources if source.provider == "command-line"]


def identity_of(config: Config) -> str:
    """A hash of everything in a configuration that decides what comes out."""
    kept = {key: value for key, value in flat(dataclasses.asdict(config)) if not is_within(key, INDIFFERENT)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def run_job(
    config: Config | None, overrides: Sequence[str], folder: Path, config_folders: Sequence[str], launcher: str
) -> float:
    """Runs a job to its end, unless it has ended before.

    One that was run with another configuration is left as it is, and told: it would go on from there, or refuse.

    Args:
        config: Its configuration; None if that is not right, which the job will tell.
        overrides: Its command line.
        folder: Its run folder.
        config_folders: Further folders of configuration files.
        launcher: Hydra's that is used. With `basic` a job has the terminal; else what it prints goes into a file.

    Returns:
        Its last validation bpb, which a sweeper minimizes; infinite if it has diverged or failed.

    Raises:
        SystemExit: a signal to this process stopped it, and the sweep with it.
    """
    identity = None if config is None else identity_of(config)
    before = Job.read(folder)
    if before is not None and config is not None and config.resume != "overwrite":
        if before.identity not in (identity, None):
            print(
                f"{folder} holds a job with another configuration: name=ANOTHER makes a sweep of its own, and "
                "resume=overwrite runs all jobs anew",
                file=sys.stderr,
            )
            return math.inf
        if before.status in ("finished", "diverged"):
            return _result(before, folder)
    Job("begun", None, list(overrides), identity).write(folder)
    if launcher in BESIDE_SWEEP:
        _end_with_parent()  # this process is the launcher's
    command = [sys.executable, "-m", "cucafera.run", *overrides, f"run_dir={quoted(os.path.relpath(folder))}"]
    if config_folders:
        command += ["--config-dir", config_folders[0]]
    with ExitStack() as stack:
        environment = os.environ | stack.enter_context(_own_gpus(config, folder.parent))
        output = None if launcher == "basic" else stack.enter_context((folder / OUTPUT).open("ab"))
        signalled, exit_code = _answered(command, environment, output)
    if signalled is not None:
        if launcher in BESIDE_SWEEP:
            os._exit(128 + signalled)  # an exception would go to the sweep, and this process wait for more work
        sys.exit(128 + signalled)
    job = Job(_status(exit_code, folder), exit_code, list(overrides), identity)
    job.write(folder)
    return _result(job, folder)


def quoted(value: str) -> str:
    """A text as one value of Hydra's grammar, whatever it holds."""
    escaped = value.replace("'", "\\'")
    return f"'{escaped}'"


def _status(exit_code: int, folder: Path) -> str:
    if exit_code == 0:
        history = _validations(folder)
        return "finished" if history[-1]["loss"] < history[0]["loss"] else "diverged"
    names = {EXIT_USER_ERROR: "refused", EXIT_DIVERGED: "diverged", EXIT_OUT_OF_TIME: "stopped"}
    stops = {128 + number: "stopped" for number in STOPS}
    return (names | stops).get(exit_code, "crashed")


def _result(job: Job, folder: Path) -> float:
    return float(_validations(folder)[-1]["bpb"]) if job.status == "finished" else math.inf


def _validations(folder: Path) -> list[dict[str, float]]:
    metrics = RunFolder(folder).read_metrics()
    assert metrics is not None  # it is written before a run ends with success
    validations: list[dict[str, float]] = metrics["validation"]
    return validations


def _answered(command: list[str], environment: dict[str, str], output: Any) -> tuple[int | None, int]:
    """Runs a command, and hands signals on to it.

    It has a session of its own: Ctrl-C on the terminal reaches this process alone, and the command once, from here.

    Returns:
        The signal that stopped the sweep, if one did, and the command's exit code.
    """
    signalled: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, frame: FrameType | None) -> None:
        handed = number
        if number in STOPS:
            signalled.append(number)  # at once: another may come while this one is answered
            by_people = sum(other != signal.SIGUSR2 for other in signalled)
            if number == signal.SIGUSR2 and len(signalled) > 1:
                return  # it comes beside the signal that has stopped the sweep
            if number != signal.SIGUSR2 and by_people == 1 and signalled[0] == signal.SIGUSR2:
                return  # or that one comes beside it
            # The command may get the first one from elsewhere too, where all processes are signalled.
            handed = signal.SIGKILL if by_people > 1 else signal.SIGUSR2
            told = f"\n{signal.Signals(number).name}: the job finishes its step and saves. Once more to end at once.\n"
            os.write(sys.stderr.fileno(), told.encode())
        if process is not None:
            process.send_signal(handed)

    before = {number: signal.signal(number, hand_on) for number in (*STOPS, signal.SIGUSR1)}
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        if signalled:  # while it was being started
            process.send_signal(signal.SIGUSR2)
        exit_code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return (signalled[0] if signalled else None), exit_code


def _end_with_parent() -> None:
    """Asks Linux to stop this process when its parent is killed: a sweep that starts again finds its folder free."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR2)


@contextmanager
def _own_gpus(config: Config | None, sweep: Path) -> Iterator[dict[str, str]]:
    """Waits for as many GPUs as a job needs, where others of this machine run beside it.

    Yields:
        What its environment needs for it to see no others; nothing where there are no more than it needs.
    """
    there = [] if config is None or config.trainer.accelerator == "cpu" else _visible_gpus()
    wanted = config.trainer.devices if config is not None and isinstance(config.trainer.devices, int) else len(there)
    if not 0 < wanted <= len(there):
        yield {}  # of too few, the job tells
        return
    held = _held_gpus(there, wanted, sweep)
    try:
        yield {"CUDA_VISIBLE_DEVICES": ",".join(held)}
    finally:
        _give_back(held)


def _held_gpus(there: Sequence[str], wanted: int, sweep: Path) -> dict[str, int]:
    """Waits for some of the GPUs, and takes all it needs at once: two jobs never wait for each other's.

    Returns:
        Names of GPUs, with descriptors that hold their locks.
    """
    while True:
        held: dict[str, int] = {}
        for gpu in there:
            path = sweep / f".{socket.gethostname()}-gpu-{gpu}.lock"
            if len(held) < wanted and (descriptor := _taken(path)) is not None:
                held[gpu] = descriptor
        if len(held) == wanted:
            return held
        _give_back(held)
        time.sleep(random.uniform(0.5, 1.5))  # not in step with others


def _give_back(held: dict[str, int]) -> None:
    for descriptor in held.values():
        os.close(descriptor)


def _visible_gpus() -> list[str]:
    """The names by which CUDA knows the GPUs that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]  # asks the driver, and touches no GPU


def _taken(path: Path) -> int | None:
    """The descriptor that holds a lock; None if another process holds it."""
    descriptor = descriptor_of(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
