"""A job of a sweep: the command of one run, in a process of its own.

No state of one job reaches another (random numbers, compiled code, memory), and jobs on several devices need nothing
special. Hydra's launchers decide where and when jobs run; this module is what they run.
"""

import ctypes
import dataclasses
import hashlib
import itertools
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

from filelock import FileLock, Timeout

from cucafera.config.errors import EXIT_DIVERGED, EXIT_OUT_OF_TIME, EXIT_USER_ERROR, UserError
from cucafera.config.fields import flat
from cucafera.config.folders import folder_problem
from cucafera.config.quoting import quoted, unescaped
from cucafera.config.schema import Config
from cucafera.output import notify
from cucafera.runs.compatibility import KEYS_WITHOUT_EFFECT, matches_key
from cucafera.runs.folder import RunFolder
from cucafera.runs.shape import shape_problem
from cucafera.storage import ChecksumError, open_to_append, read_json_with_checksum, write_json_with_checksum
from cucafera.sweeps.metrics import primary_metric, shown_metrics, to_minimize
from cucafera.sweeps.progress import OUTPUT_FILE, JobEvent, last_lines

JOB_FILE = "job.json"
"""The record of a job, in its folder."""
JOB: dict[str, Any] = {
    "status": str,
    "exit_code": (int, type(None)),
    "overrides": [str],
    "identity": (str, type(None)),
}
"""Shape of the record of a job."""
MESSAGE_LINES = 5
"""Lines at the end of the output of a job that failed, which the sweep shows."""
LOCAL_LAUNCHERS = ("joblib", "parallel")
"""Launchers whose processes end with the sweep; the jobs of a cluster's launcher continue."""
PR_SET_PDEATHSIG = 1
"""Option of prctl(2), on Linux: the signal that a process gets when its parent dies."""
UNREPEATED = (signal.SIGHUP, signal.SIGUSR2)
"""Stop signals that are not sent again to exit immediately."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
KEYS_WITHOUT_EFFECT_ON_RESULT = (*KEYS_WITHOUT_EFFECT, "trainer")
"""Keys that do not change the result of a job."""


@dataclasses.dataclass(frozen=True)
class JobRecord:
    """The content of job.json.

    Attributes:
        status: finished, diverged (stopped by the guards, or worse than before training), refused (for something that
            the user can fix), stopped (by a signal, or max_time), crashed, or started (and never ended).
        exit_code: Of its process; None while it has not ended.
        overrides: Its command line.
        identity: A hash of its configuration: see `identity_of`.
    """

    status: str
    exit_code: int | None
    overrides: list[str]
    identity: str | None

    @classmethod
    def read(cls, folder: Path) -> "JobRecord | None":
        """Return the record in a folder; None if there is none. Raises UserError if it was edited or damaged."""
        path = folder / JOB_FILE
        try:
            content = read_json_with_checksum(path)
        except FileNotFoundError:
            return None
        except (OSError, ChecksumError) as error:
            problem: object = getattr(error, "strerror", None) or error
        else:
            problem = shape_problem(content, JOB)
            if problem is None:
                return cls(**{field.name: content[field.name] for field in dataclasses.fields(cls)})
        raise UserError(f"{path} cannot be used: {problem}. Delete it, and run the command of its sweep again")

    def write(self, folder: Path) -> None:
        """Write the record into a folder."""
        write_json_with_checksum(folder / JOB_FILE, dataclasses.asdict(self))


def identity_of(config: Config) -> str:
    """Return a hash of everything in a configuration that affects the result."""
    kept = {
        key: value
        for key, value in flat(dataclasses.asdict(config))
        if not matches_key(key, KEYS_WITHOUT_EFFECT_ON_RESULT)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class SweepJob:
    """A job as a launcher starts it.

    Attributes:
        number: Its place in the sweep, from 0.
        label: What is swept, with its values, for the user.
        overrides: Its command line.
        arguments: Overrides of Hydra's own settings that the job needs too.
        folder: Its run folder.
        sweep: The sweep folder.
        launcher: The name of Hydra's launcher.
    """

    number: int
    label: str
    overrides: Sequence[str]
    arguments: Sequence[str]
    folder: Path
    sweep: Path
    launcher: str

    def report(self, **state: Any) -> None:
        """Report its start or its end to the sweep."""
        JobEvent(self.number, self.label, str(self.folder), time.time(), **state).append(self.sweep)


def run_job(config: Config | None, job: SweepJob) -> float:
    """Run a job to its end, unless it has ended before, and report that to the sweep.

    A folder that holds a job with another configuration is left as it is, with a message: that run would resume with
    the wrong settings, or be refused.

    Args:
        config: Its configuration; None if that is invalid, which the job's own process reports.
        job: What to run. Its output goes to a file in its folder.

    Returns:
        Its last value of the primary metric, negated if higher is better, since Hydra's sweepers minimize; infinite if
        the job diverged or failed.

    Raises:
        SystemExit: a signal to this process stopped the job, and with it the sweep.
    """
    folder = job.folder
    if problem := folder_problem(folder):
        job.report(status="not run", message=problem)
        return math.inf
    identity = None if config is None else identity_of(config)
    note = ""
    try:
        before = JobRecord.read(folder)
        result = _result(before, config, folder) if before is not None else math.inf
    except UserError as error:  # a run that is complete writes its results again
        note = f"{error}. The job is run again"
        before = None
    if before is not None and config is not None and config.resume != "overwrite":
        if before.identity not in (identity, None):
            job.report(
                status="not run",
                message=f"{folder} holds a job with another configuration: choose another name=... for this sweep, or "
                "run all of its jobs again with resume=overwrite",
            )
            return math.inf
        if before.status in ("finished", "diverged"):
            job.report(status=before.status, **_results(before, config, folder))
            return result
    JobRecord("started", None, list(job.overrides), identity).write(folder)
    if job.launcher in LOCAL_LAUNCHERS:
        _end_with_parent()  # this process is the launcher's
    run_dir = f"run_dir={quoted(os.path.relpath(folder))}"
    command = [sys.executable, "-m", "cucafera.run", *map(unescaped, job.overrides), run_dir, *job.arguments]
    started = time.monotonic()
    with ExitStack() as stack:
        environment = os.environ | stack.enter_context(_own_gpus(config, job.sweep))
        output = stack.enter_context(os.fdopen(open_to_append(folder / OUTPUT_FILE), "ab"))
        written = output.seek(0, os.SEEK_END)
        job.report()
        signalled, exit_code = _run_forwarding_signals(command, environment, output)
    record = JobRecord(_status(exit_code, config, folder), exit_code, list(job.overrides), identity)
    message = "" if record.status == "finished" else last_lines(folder / OUTPUT_FILE, written, MESSAGE_LINES)
    job.report(
        status="stopped" if signalled else record.status,
        seconds=time.monotonic() - started,
        message="\n".join(filter(None, [note, message])),
        **_results(record, config, folder),
    )
    if signalled is not None:
        if job.launcher in LOCAL_LAUNCHERS:
            os._exit(128 + signalled)  # an exception would reach the sweep, and this process would wait for more work
        sys.exit(128 + signalled)
    record.write(folder)
    return _result(record, config, folder)


def _results(job: JobRecord, config: Config | None, folder: Path) -> dict[str, Any]:
    """Return the results of a job as those of a `JobEvent`; none unless it finished."""
    if job.status != "finished":
        return {}
    settings = {} if config is None else dict(flat(dataclasses.asdict(config)))
    metrics = RunFolder(folder).read_metrics()
    last = metrics["validation"][-1] if metrics else {}
    words = [f"{metric.name} {last[metric.name]:{metric.format}}" for metric in shown_metrics([settings])]
    return {"results": "  ".join(words), "cost": _result(job, config, folder)}


def _status(exit_code: int, config: Config | None, folder: Path) -> str:
    if exit_code == 0:
        values = _validations(config, folder)
        # Equal is not worse: an accuracy over few pairs often ends where it began.
        return "finished" if math.isfinite(values[-1]) and values[-1] <= values[0] else "diverged"
    names = {EXIT_USER_ERROR: "refused", EXIT_DIVERGED: "diverged", EXIT_OUT_OF_TIME: "stopped"}
    stops = {128 + number: "stopped" for number in STOP_SIGNALS}
    return (names | stops).get(exit_code, "crashed")


def _result(job: JobRecord, config: Config | None, folder: Path) -> float:
    return _validations(config, folder)[-1] if job.status == "finished" else math.inf


def _validations(config: Config | None, folder: Path) -> list[float]:
    """Return the primary metric of each validation of a finished run, such that lower is better."""
    metric = primary_metric({} if config is None else dict(flat(dataclasses.asdict(config))))
    metrics = RunFolder(folder).read_metrics()
    if metrics is None:
        raise UserError(f"{folder} holds no metrics.json")
    return [to_minimize(metric, validation[metric.name]) for validation in metrics["validation"]]


def _run_forwarding_signals(command: list[str], environment: dict[str, str], output: Any) -> tuple[int | None, int]:
    """Run a command, and forward signals to it.

    The command has a session of its own: Ctrl-C on the terminal reaches this process alone, which forwards it once.

    Returns:
        The signal that stopped the sweep, or None, and the command's exit code.
    """
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        forwarded = number
        if number in STOP_SIGNALS:
            received.append(number)  # first of all: another signal may arrive while this one is handled
            by_user = sum(other not in UNREPEATED for other in received)
            # The death of the sweep's process (SIGUSR2), a closed terminal (SIGHUP) and a signal of the user often come
            # together, in any order, where a terminal or scheduler signals a whole group. Together they are one request
            # to save and stop; only a second signal of the user may kill a job that is saving.
            if number in UNREPEATED and len(received) > 1:
                return
            if number not in UNREPEATED and by_user == 1 and received[0] in UNREPEATED:
                return
            # SIGUSR2 rather than the user's signal: the command may get that one directly too, and would take two of
            # them for a request to exit immediately.
            forwarded = signal.SIGKILL if by_user > 1 else signal.SIGUSR2
            notify(
                f"{signal.Signals(number).name} received: the job saves a checkpoint after this step. Press Ctrl-C "
                "again to exit immediately."
            )
        if process is not None:
            process.send_signal(forwarded)

    handled = [
        number
        for number in (*STOP_SIGNALS, signal.SIGUSR1)
        if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN)  # started by nohup
    ]
    before = {number: signal.signal(number, forward) for number in handled}
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        if received:  # a signal that arrived while the process was being started
            process.send_signal(signal.SIGUSR2)
        exit_code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return (received[0] if received else None), exit_code


def _end_with_parent() -> None:
    """Ask Linux to stop this process when its parent is killed, so that a sweep that is restarted finds no lock."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR2)


@contextmanager
def _own_gpus(config: Config | None, sweep: Path) -> Iterator[dict[str, str]]:
    """Wait for as many GPUs as a job needs, and hold them: other jobs may run on this machine at the same time.

    Yields:
        Environment variables that hide the other GPUs; none if the machine has no more GPUs than the job needs.
    """
    gpus = [] if config is None or config.trainer.accelerator == "cpu" else _visible_gpus()
    needed = config.trainer.devices if config is not None and isinstance(config.trainer.devices, int) else len(gpus)
    if not 0 < needed <= len(gpus):
        yield {}  # the job itself reports that there are too few
        return
    held = _hold_gpus(gpus, needed, sweep)
    try:
        yield {"CUDA_VISIBLE_DEVICES": ",".join(held)}
    finally:
        _release(held)


def _hold_gpus(gpus: Sequence[str], needed: int, sweep: Path) -> dict[str, FileLock]:
    """Wait for some of the GPUs, and hold all at once or none: two jobs cannot deadlock on each other's GPUs.

    Returns:
        Names of GPUs, with their locks.
    """
    while True:
        held: dict[str, FileLock] = {}
        for gpu in gpus:
            lock = FileLock(sweep / f".{socket.gethostname()}-gpu-{gpu}.lock", fallback_to_soft=False)
            if len(held) < needed and _is_acquired(lock):
                held[gpu] = lock
        if len(held) == needed:
            return held
        _release(held)
        time.sleep(random.uniform(0.5, 1.5))  # random, so that two waiting jobs do not stay in step


def _is_acquired(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def _release(held: dict[str, FileLock]) -> None:
    for lock in held.values():
        lock.release()


def _visible_gpus() -> list[str]:
    """Return the names by which CUDA knows the GPUs that this process may use.

    CUDA ends the list of CUDA_VISIBLE_DEVICES at the first name that is none of a GPU, such as -1, none or NoDevFiles.
    """
    import torch

    count = torch.cuda.device_count()  # asks the driver, without initializing a GPU
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if named is None else map(str.strip, named.split(","))
    return list(itertools.islice(names, count))
