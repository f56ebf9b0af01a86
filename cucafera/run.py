"""The command `python -m cucafera.run`: trains what its configuration describes.

Heavy modules are imported after the configuration has been checked.
"""

import argparse
import errno
import logging
import os
import signal
import sys
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cucafera.config.command_line import JOB_KEYS, check_command_line, parse_command_line, sweep_arguments
from cucafera.config.compose import check_composed, hydra_session, problem_list, register
from cucafera.config.errors import EXIT_USER_ERROR, UserError
from cucafera.config.help import help_text, shown_config
from cucafera.config.launch import start_run, start_sweep
from cucafera.config.schema import Config, ModelConfig
from cucafera.process import keep_freed_memory, let_threads_wait_briefly

log = logging.getLogger(__name__)

CANNOT_BE_WRITTEN = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.ENAMETOOLONG,
)  # fmt: skip


def main() -> None:
    """Train the run of the command line; show its configuration, or the help, if that is asked for."""
    let_threads_wait_briefly(os.environ)
    keep_freed_memory()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed at the start
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    logging.raiseExceptions = False  # a disk too full for the log is reported by what matters more
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # there is nothing to save yet
    signal.signal(signal.SIGUSR2, signal.default_int_handler)  # a sweep stops its jobs with this signal
    command = parse_command_line(sys.argv[1:])
    try:
        with hydra_session(read_model_elsewhere):
            _run_command(command)
    except KeyboardInterrupt:
        print("Interrupted; run the same command again to start or resume.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of the output has left
        sys.exit(1)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in CANNOT_BE_WRITTEN:
            raise
        print(f"{error.filename or 'the run folder'} cannot be written: {error.strerror}", file=sys.stderr)
        if error.errno == errno.ENAMETOOLONG and command.multirun:
            advice = "Jobs are named by what is swept; number them: hydra.sweep.subdir='${hydra.job.num}'"
            print(advice, file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def _run_command(command: argparse.Namespace) -> None:
    if command.help:
        print(help_text())
        return
    if command.multirun and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print("A sweep is started as one process: its jobs start the others.", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    node, config, problems = check_command_line(command.overrides, command.multirun)
    if node is None or problems:
        print(problem_list(problems), file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    if command.cfg:
        print(shown_config(node, command.cfg, command.resolve))
    elif command.multirun:
        start_sweep(sweep_arguments(node, command.overrides), job)
    else:
        start_run(node, lambda folder: _single_run(config, list(node.hydra.overrides.task), folder))


def _single_run(config: Config, overrides: list[str], folder: str) -> float:
    config.run_dir = os.path.relpath(folder)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        log.info("%s: loading PyTorch", config.run_dir)
    try:
        return train(config, overrides)
    except UserError as error:
        log.error("%s", error)
        sys.exit(error.exit_code)


def job(composed: DictConfig) -> float:
    """Run one job of a sweep. Returns its result, which Hydra's sweepers minimize.

    Launchers import it by its name in other processes.
    """
    from cucafera.sweeps.jobs import run_job

    register(read_model_elsewhere)
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    config, problems = check_composed(composed)
    config.run_dir = os.path.relpath(folder)
    return run_job(
        None if problems else config,
        overrides=list(hydra_config.overrides.task),
        folder=folder,
        arguments=[text for text in hydra_config.overrides.hydra if JOB_KEYS.match(text)],
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

    return Job(config, overrides, hardware, started).run()


if __name__ == "__main__":
    # Under its own name, so that the launchers of sweeps find `job` in other processes too.
    from cucafera.run import main as run_main

    run_main()
