"""The command `python -m cucafera.run`: trains what its configuration describes.

Heavy modules are imported after the configuration has been checked, and the run folder is locked.
"""

import os
import re
import sys

if __name__ == "__main__":  # before the other imports
    from cucafera.output import protect_output
    from cucafera.process import exit_on_interrupt, is_first_process

    exit_on_interrupt()
    protect_output()
    shows = re.compile(r"--help|-h|--version|(--cfg|-c)(=.*)?")  # what these print is all that they print
    if is_first_process(os.environ) and not any(map(shows.fullmatch, sys.argv)):
        print("Reading the configuration", flush=True)

import argparse
import contextlib
import errno
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cucafera.config.command_line import JOB_KEYS, check_command_line, parse_command_line, sweep_arguments
from cucafera.config.compose import as_typed, check_job, hydra_session, problem_list, register
from cucafera.config.errors import EXIT_USER_ERROR, UserError
from cucafera.config.folders import folder_problem, is_run, job_label
from cucafera.config.help import help_text, shown_config
from cucafera.config.launch import start_run, start_sweep
from cucafera.config.schema import Config, ModelConfig
from cucafera.output import protect_output, report_lost_output
from cucafera.process import is_first_process, keep_freed_memory, let_threads_wait_briefly, raise_on_interrupt

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
    further = None if command.cfg else _missing_inputs
    node, config, problems = check_command_line(command.overrides, command.multirun, further)
    if not (command.cfg or command.multirun) and (problem := folder_problem(Path(config.run_dir))):
        problems.append(problem)
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
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        start_run(node, config.run_dir, lambda path: _single_run(config, as_typed(node.hydra.overrides.task), path))
    except UserError as error:
        log.error("%s", error)
        if created:
            remove_unused_folder(folder)
            for parent in created[1:]:
                with contextlib.suppress(OSError):  # another run is in it
                    parent.rmdir()
        sys.exit(error.exit_code)


def _missing_inputs(config: Config, folder: Path) -> Iterator[str]:
    """Yield a sentence for each input of a new run or sweep that does not exist; one that has started may need none."""
    from cucafera.runs.inputs import input_problems

    has_started = is_run(folder) or any(folder.glob("*/job.json"))
    if config.resume == "overwrite" or not has_started:
        yield from input_problems(config)


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
    return train(config, overrides)


def job(composed: DictConfig) -> float:
    """Run one job of a sweep. Returns its result, which Hydra's sweepers minimize.

    Launchers import it by its name in other processes.
    """
    from cucafera.sweeps.jobs import SweepJob, run_job

    protect_output()
    register(read_model_elsewhere)
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    overrides = as_typed(hydra_config.overrides.task)
    config, problems = check_job(composed, overrides, os.path.relpath(folder))
    swept = SweepJob(
        number=hydra_config.job.num,
        label=job_label(overrides, hydra_config.job.config.override_dirname.exclude_keys),
        overrides=overrides,
        arguments=[text for text in as_typed(hydra_config.overrides.hydra) if JOB_KEYS.match(text)],
        folder=folder,
        sweep=Path(hydra_config.sweep.dir),
        launcher=hydra_config.runtime.choices["hydra/launcher"],
    )
    return run_job(None if problems else config, swept)


def read_model_elsewhere(init_from: str) -> ModelConfig | None:
    """Return the model of a Hugging Face folder or name, for model=inherited; None if it is no such thing.

    Raises:
        UserError: it is a GGUF file, or a Hugging Face folder that is not supported.
    """
    from cucafera.interop.peft_spec import read_spec
    from cucafera.runs.locate import check_not_gguf, is_hugging_face

    check_not_gguf(init_from, "init_from=")
    return read_spec(init_from, with_weights=False).model if is_hugging_face(init_from) else None


def train(config: Config, overrides: list[str]) -> float:
    """Train the run of a configuration, or resume it, alone in its folder.

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
    from cucafera.runs.lock import LOCK, run_lock

    is_first = is_first_process(os.environ)
    with run_lock(Path(config.run_dir, LOCK)) if is_first else contextlib.nullcontext():
        if is_first:
            log.info("%s: loading PyTorch and Lightning", config.run_dir)
        from cucafera.training.hardware import NoGpuError, decide_hardware

        try:  # a missing GPU is reported before Lightning is imported
            hardware = decide_hardware(config, os.environ)
        except NoGpuError as error:
            from cucafera.training.without_gpu import cpu_advice

            raise UserError(f"{error}.\n{cpu_advice(config, overrides)}") from error

        from cucafera.training.job import Job

        raise_on_interrupt()
        return Job(config, overrides, hardware, started).run()


if __name__ == "__main__":
    # Under its own name, so that the launchers of sweeps find `job` in other processes too.
    from cucafera.run import main as run_main

    run_main()
