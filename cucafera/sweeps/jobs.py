"""A job of a sweep: the same command as alone, in a process of its own.

So nothing of one job reaches another, neither random numbers nor compiled code nor memory, and several devices are
as good as one. Hydra's launchers decide where and when jobs run; here is what they run.
"""

import ctypes
import dataclasses
import fcntl
import json
import math
import os
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

from omegaconf import OmegaConf

from cucafera.config import EXIT_DIVERGED, EXIT_OUT_OF_TIME, EXIT_USER_ERROR, Config
from cucafera.data.files import descriptor_of, write_text

JOB = "job.json"
"""What is known of a job that has ended, in its folder."""
OUTPUT = "job.out"
"""What a job has printed, where it has no terminal."""
PR_SET_PDEATHSIG = 1
"""Of prctl(2), on Linux: the signal that a process gets when its parent dies."""
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a job has ended.

    Attributes:
        status: finished, diverged (stopped by the guards, or worse than before training), refused (for something that
            the user can mend), stopped (by a signal, or max_time), or crashed.
        exit_code: Of its process.
        overrides: Its command line.
    """

    status: str
    exit_code: int
    overrides: list[str]

    @classmethod
    def read(cls, folder: Path) -> "Ended | None":
        """What a job has left in its folder, if it has ended."""
        try:
            return cls(**json.loads((folder / JOB).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Leaves it there."""
        write_text(folder / JOB, json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def run_job(
    config: Config | None, overrides: Sequence[str], folder: Path, config_folders: Sequence[str], has_terminal: bool
) -> float:
    """Runs a job to its end, unless it has ended before with the same configuration.

    Args:
        config: Its configuration; None if that is not right, which the job will tell.
        overrides: Its command line.
        folder: Its run folder.
        config_folders: Further folders of configuration files.
        has_terminal: Whether it may write to the terminal; else what it prints goes into a file in its folder.

    Returns:
        Its last validation bpb, which a sweeper minimizes; infinite if it has diverged or failed.

    Raises:
        SystemExit: a signal to this process stopped it, and the sweep with it.
    """
    before = Ended.read(folder)
    if before is not None and before.status in ("finished", "diverged") and _is_configured(config, folder):
        return _result(before, folder)
    (folder / JOB).unlink(missing_ok=True)
    command = [sys.executable, "-m", "cucafera.run", *overrides, f"run_dir={quoted(os.path.relpath(folder))}"]
    if config_folders:
        command += ["--config-dir", config_folders[0]]
    with ExitStack() as stack:
        environment = os.environ | stack.enter_context(_own_gpus(config, folder.parent))
        output = None if has_terminal else stack.enter_context((folder / OUTPUT).open("ab"))
        signalled, exit_code = _answered(command, environment, output)
    if signalled is not None:
        sys.exit(128 + signalled)
    ended = Ended(_status(exit_code, folder), exit_code, list(overrides))
    ended.write(folder)
    return _result(ended, folder)


def quoted(value: str) -> str:
    """A text as one value of Hydra's grammar, whatever it holds."""
    escaped = value.replace("'", "\\'")
    return f"'{escaped}'"


def _is_configured(config: Config | None, folder: Path) -> bool:
    """Whether the run in a folder has this configuration, to the letter."""
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
    except OSError:
        return False
    return config is not None and text == OmegaConf.to_yaml(OmegaConf.structured(config))


def _status(exit_code: int, folder: Path) -> str:
    if exit_code == 0:
        losses = [record["loss"] for record in _metrics(folder)["validation"]]
        return "finished" if losses[-1] < losses[0] else "diverged"
    names = {EXIT_USER_ERROR: "refused", EXIT_DIVERGED: "diverged", EXIT_OUT_OF_TIME: "stopped"}
    stops = {128 + number: "stopped" for number in FORWARDED}
    return (names | stops).get(exit_code, "crashed")


def _result(ended: Ended, folder: Path) -> float:
    return float(_metrics(folder)["validation"][-1]["bpb"]) if ended.status == "finished" else math.inf


def _metrics(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_bytes())
    return metrics


def _answered(command: list[str], environment: dict[str, str], output: Any) -> tuple[int | None, int]:
    """Runs a command, and hands signals on to it.

    It has a session of its own: Ctrl-C on the terminal reaches this process alone, and the command once, from here.

    Returns:
        The signal that stopped the sweep, if one did, and the command's exit code.
    """
    signalled: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGUSR1:
            signalled.append(number)
        if process is not None:
            process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in FORWARDED}
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
            process.send_signal(signalled[0])
        exit_code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return (signalled[0] if signalled else None), exit_code


def _end_with_parent() -> None:
    """Asks Linux to stop this process when its parent is killed: a sweep that starts again finds its folder free."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def _own_gpus(config: Config | None, sweep: Path) -> Iterator[dict[str, str]]:
    """Waits for as many GPUs as a job needs, where others of this machine run beside it.

    Yields:
        What its environment needs for it to see no others; nothing where there are no more than it needs.
    """
    wanted = 1 if config is None else config.trainer.devices
    if config is None or config.trainer.accelerator == "cpu" or not isinstance(wanted, int):
        yield {}
        return
    there = _visible_gpus()
    if len(there) <= wanted:
        yield {}
        return
    held: dict[str, int] = {}
    try:
        while len(held) < wanted:
            for gpu in there:
                path = sweep / f".{socket.gethostname()}-gpu-{gpu}.lock"
                if len(held) < wanted and gpu not in held and (descriptor := _taken(path)) is not None:
                    held[gpu] = descriptor
            if len(held) < wanted:
                time.sleep(1)
        yield {"CUDA_VISIBLE_DEVICES": ",".join(held)}
    finally:
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
