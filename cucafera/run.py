"""The command `python -m cucafera.run`: trains what its configuration describes.

Heavy modules are imported after the configuration has been checked.
"""

if __name__ == "__main__":  # before the other imports
    from cucafera.process import exit_on_interrupt

    exit_on_interrupt()

import argparse
import contextlib
import errno
import logging
import os
import re
import signal
import sys
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cucafera.config.command_line import JOB_KEYS, check_command_line, parse_command_line, sweep_arguments
from cucafera.config.compose import as_typed, check_composed, hydra_session, problem_list, register
from cucafera.config.errors import EXIT_USER_ERROR, UserError
from cucafera.config.folders import folder_problem
from cucafera.config.help import help_text, shown_config
from cucafera.config.launch import start_run, start_sweep
from cucafera.config.schema import Config, ModelConfig
from cucafera.output import protect_output, report_lost_output
from cucafera.process import keep_freed_memory, let_threads_wait_briefly, raise_on_interrupt

log = logging.getLogger(__name__)

CANNOT_BE_WRITTEN = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.ENAMETOOLONG,
    errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENXIO,
)  # fmt: skip
ADDED_BY_LIGHTNING = re.compile(r"hydra\.(run\.dir=.*|job\.name=train_ddp_process_\d+|output_subdir=null)", re.DOTALL)
"""Overrides that Lightning adds to the command of the other processes of a job, which have the folder of the first."""


def main() -> None:
    """Train the run of the command line; show its configuration, or the help, if that is asked for."""
    let_threads_wait_briefly(os.environ)
    keep_freed_memory()
    protect_output()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # there is nothing to save yet
    signal.signal(signal.SIGUSR2, signal.default_int_handler)  # a sweep stops its jobs with this signal
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    command = parse_command_line([text for text in sys.argv[1:] if is_first or not ADDED_BY_LIGHTNING.fullmatch(text)])
    try:
        with hydra_session(read_model_elsewhere):
            _run_command(command)
    except KeyboardInterrupt:
        print("Interrupted; run the same command again to start or resume.", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in CANNOT_BE_WRITTEN:
            raise
        print(f"{error.filename or 'the run folder'} cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def _run_command(command: argparse.Namespace) -> None:
    protect_output(is_required=command.help or command.cfg is not None)
    if command.help:
        print(help_text())
        return
    if command.multirun and os.environ.get("WORLD_SIZE", "1") != "1":
        print("A sweep is started as one process: its jobs start the others.", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    node, config, problems = check_command_line(command.overrides, command.multirun)
    if node is None or problems:
        print(problem_list(problems), file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    if command.cfg:
        print(shown_config(node, command.cfg, command.resolve))
    elif command.multirun:
        raise_on_interrupt()
        start_sweep(sweep_arguments(node, command.overrides), job)
    else:
        _start_run(node, config)


def _start_run(node: DictConfig, config: Config) -> None:
    folder = Path(config.run_dir)
    if problem := folder_problem(folder):
        raise UserError(problem)
    is_new = not folder.exists()
    try:
        start_run(node, config.run_dir, lambda path: _single_run(config, as_typed(node.hydra.overrides.task), path))
    except UserError as error:
        log.error("%s", error)
        if is_new:
            remove_unused_folder(folder)
        sys.exit(error.exit_code)


def remove_unused_folder(folder: Path) -> None:
    """Remove a run folder that holds nothing but the log of this process and the lock file, which no one holds."""
    from filelock import FileLock, Timeout

    with contextlib.suppress(OSError, Timeout), FileLock(folder / ".lock", fallback_to_soft=False).acquire(timeout=0):
        if {path.name for path in folder.iterdir()} <= {"run.log", ".lock"}:
            for name in ("run.log", ".lock"):
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()


def _single_run(config: Config, overrides: list[str], folder: str) -> float:
    config.run_dir = os.path.relpath(folder)
    report_lost_output()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        log.info("%s: loading PyTorch", config.run_dir)
    return train(config, overrides)


def job(composed: DictConfig) -> float:
    """Run one job of a sweep. Returns its result, which Hydra's sweepers minimize.

    Launchers import it by its name in other processes.
    """
    from cucafera.sweeps.jobs import run_job

    protect_output()
    register(read_model_elsewhere)
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    config, problems = check_composed(composed)
    config.run_dir = os.path.relpath(folder)
    return run_job(
        None if problems else config,
        overrides=as_typed(hydra_config.overrides.task),
        folder=folder,
        arguments=[text for text in as_typed(hydra_config.overrides.hydra) if JOB_KEYS.match(text)],
        launcher=hydra_config.runtime.choices["hydra/launcher"],
    )


def read_model_elsewhere(init_from: str) -> ModelConfig | None:
    """Return the model of a Hugging Face folder or name, for model=inherited; None if it is no such thing."""
    from cucafera.interop.hf_spec import folder_of, read_hf_spec
    from cucafera.runs.locate import is_hugging_face

    return read_hf_spec(folder_of(init_from, with_weights=False)).model if is_hugging_face(init_from) else None


def train(config: Config, overrides: list[str]) -> float:
    """Train the run of a configuration, or resume it.

    Args:
        config: What to do; its run_dir is the run folder.
        overrides: The command line, for the record.

    Returns:
        The last validation's primary metric.

    Raises:
        UserError: A problem that the user can fix.
        SystemExit: A signal or max_time stopped training; with the exit code that says so.
    """
    started = time.monotonic()
    from cucafera.training.hardware import decide_hardware

    hardware = decide_hardware(config, os.environ)  # a missing GPU is reported before Lightning is imported

    from cucafera.training.job import Job

    raise_on_interrupt()
    return Job(config, overrides, hardware, started).run()


if __name__ == "__main__":
    # Under its own name, so that the launchers of sweeps find `job` in other processes too.
    from cucafera.run import main as run_main

    run_main()
