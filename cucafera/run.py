"""The front door: `python -m cucafera.run` trains what its configuration says.

Composes and checks the configuration, builds, fits, reports. What is heavy to import is imported once the
configuration is known to be right.
"""

import contextlib
import dataclasses
import errno
import gc
import logging
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from cucafera.composition import (
    CONFIG_NAME,
    command_line_problems,
    config_directory,
    help_text,
    hydra_arguments,
    listed,
    register_schema,
    typed_config,
)
from cucafera.config import EXIT_DIVERGED, EXIT_USER_ERROR, Config, UserError
from cucafera.training.process import keep_freed_memory, let_threads_wait_briefly

if TYPE_CHECKING:
    from cucafera.data.windows import WindowDataModule
    from cucafera.training.callbacks.interruption import Interruption
    from cucafera.training.hardware import Hardware
    from cucafera.training.run_folder import RunFolder
    from cucafera.training.trainer import Callbacks

log = logging.getLogger(__name__)

CANNOT_BE_WRITTEN = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.ENAMETOOLONG,
)  # fmt: skip


def main() -> None:
    """Answers --help and wrong command lines at once; leaves the rest to Hydra and `job`."""
    let_threads_wait_briefly(os.environ)
    keep_freed_memory()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra would print a trace of what is told in a sentence below
    logging.raiseExceptions = False  # a disk too full for the log is told by what matters more
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # there is nothing to save yet, and nothing to die of
    signal.signal(signal.SIGUSR2, signal.default_int_handler)  # a sweep stops its jobs so
    arguments = get_args_parser().parse_intermixed_args()
    if arguments.help:
        print(help_text())
        return
    if arguments.multirun and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print("A sweep is started as one process: its jobs start the others.", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    if arguments.multirun and (arguments.cfg or arguments.info):
        print("--cfg and --info show one run: leave --multirun out, and give one value a key.", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    problems = command_line_problems(arguments.overrides, arguments.multirun, arguments.config_dir)
    if problems:
        print(listed(problems), file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    flags = [argument for argument in sys.argv[1:] if argument not in arguments.overrides]
    sys.argv[1:] = [*flags, *hydra_arguments(arguments.overrides, arguments.multirun, arguments.config_dir)]
    register_schema()
    application = hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=CONFIG_NAME)(job)
    try:
        application()
    except KeyboardInterrupt:
        print("Interrupted; the same command begins or goes on.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno not in CANNOT_BE_WRITTEN:
            raise
        print(f"{error.filename or 'the run folder'} cannot be written: {error.strerror}", file=sys.stderr)
        if error.errno == errno.ENAMETOOLONG and arguments.multirun:
            advice = "Jobs are named by what is swept; number them: hydra.sweep.subdir='${hydra.job.num}'"
            print(advice, file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def job(composed: DictConfig) -> float:
    """One run, or one of a sweep. Returns its validation bpb, which Hydra's sweepers minimize."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        return _job_of_sweep(composed, hydra_config)
    try:
        return train(_config_in(composed, hydra_config), list(hydra_config.overrides.task))
    except UserError as error:
        log.error("%s", error)
        sys.exit(error.exit_code)


def _config_in(composed: DictConfig, hydra_config: Any) -> Config:
    config = typed_config(composed)
    config.run_dir = os.path.relpath(hydra_config.runtime.output_dir)
    return config


def _job_of_sweep(composed: DictConfig, hydra_config: Any) -> float:
    from cucafera.sweeps.jobs import own_config_folders, run_job

    register_schema()  # a launcher may have brought this here from another process
    try:
        config = _config_in(composed, hydra_config)
    except UserError:
        config = None
    return run_job(
        config,
        overrides=list(hydra_config.overrides.task),
        folder=Path(hydra_config.runtime.output_dir),
        config_folders=own_config_folders(hydra_config),
        launcher=hydra_config.runtime.choices["hydra/launcher"],
    )


def train(config: Config, overrides: list[str]) -> float:
    """Trains, or goes on training, the run of a configuration, alone in its folder.

    Args:
        config: What to do; its run_dir is the run folder.
        overrides: The command line, for the record.

    Returns:
        The last validation's bpb.

    Raises:
        UserError: what the user can mend.
        SystemExit: a signal or max_time stopped training; with the exit code that says so.
    """
    started = time.monotonic()
    from cucafera.training.hardware import decide_hardware

    hardware = decide_hardware(config, os.environ)  # reports a missing GPU before Lightning is imported

    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from cucafera.training.callbacks.guards import GuardsError, RollBack
    from cucafera.training.callbacks.interruption import Interruption
    from cucafera.training.run_folder import RunFolder
    from cucafera.training.run_lock import run_lock

    folder = RunFolder(Path(config.run_dir))
    while folder.ran_out_of_memory(config, hardware) and (smaller := hardware.with_less_memory(config)):
        hardware = smaller
    # Lightning knows the node of a process that a person started there by hand only later, when it has a Trainer.
    is_first_process = rank_zero_only.rank == 0 and os.environ.get("NODE_RANK", "0") == "0"  # type: ignore[attr-defined]
    interruption = Interruption(config, started)
    left_out: set[int] = set()
    rollbacks: Counter[int] = Counter()
    is_ours = False
    with run_lock(folder.lock) if is_first_process else contextlib.nullcontext(), interruption.giving_back():
        while True:
            try:
                return _session(config, overrides, hardware, folder, interruption, is_first_process, left_out, is_ours)
            except RollBack as wish:
                step = folder.checkpoints.newest_step()
                if interruption.exit_code is not None:
                    if is_first_process:
                        folder.note("stopped", saved_step=step, why=interruption.reason)
                        log.info("%s. %s", wish.why, stop_line(interruption.reason, None, step))
                    _leave(interruption.exit_code, is_first_process)
                rollbacks[step] += 1
                if rollbacks[step] > config.callbacks.guards.most_in_a_row:
                    why = (
                        f"{wish.why}, and going back to step {step:,} was tried {rollbacks[step] - 1} times. Lower "
                        "optimizer.lr and go on with 'resume_despite=[optimizer.lr]'"
                    )
                    _give_up(why, folder, is_first_process)
                left_out.update(wish.batches)
                if is_first_process:
                    batches = ", ".join(f"{batch:,}" for batch in wish.batches)
                    log.warning("%s: back to step %s, and on without batch %s", wish.why, f"{step:,}", batches)
                    folder.note("rolled back", why=wish.why, to_step=step, left_out_batches=sorted(left_out))
            except GuardsError as error:
                _give_up(str(error), folder, is_first_process)
            except torch.OutOfMemoryError as error:
                hardware = _less_memory(config, hardware, folder, is_first_process, error)
            is_ours = True
            gc.collect()  # model and optimizer, before there are others
            if hardware.compile:
                torch.compiler.reset()  # or what was compiled for them would be made general when others come
            torch.cuda.empty_cache()


def _less_memory(
    config: Config, hardware: "Hardware", folder: "RunFolder", is_first_process: bool, error: BaseException
) -> "Hardware":
    """The settings to go on with after a GPU ran out of memory, which the run remembers.

    Raises UserError if the settings allow nothing smaller, or other processes wait for this one.
    """
    if is_first_process:
        folder.note_out_of_memory(config, hardware)
    smaller = hardware.with_less_memory(config)
    windows = f"{hardware.micro_batch_windows} window{'s' if hardware.micro_batch_windows > 1 else ''} at a time"
    if smaller is None:
        advice = (
            "set trainer.micro_batch_windows=auto or to less"
            if hardware.micro_batch_windows > 1
            else "set trainer.activation_checkpointing=auto, or choose a smaller model or sequence_length"
        )
        raise UserError(f"the GPU has too little memory for {windows}: {advice}") from error
    what = f"{smaller.micro_batch_windows} at a time" + (
        " and activation checkpointing" if smaller.activation_checkpointing else ""
    )
    if hardware.world_size > 1:
        raise UserError(f"a GPU has too little memory for {windows}: the same command goes on with {what}") from error
    log.warning("The GPU has too little memory for %s: on with %s. The result stays the same.", windows, what)
    return smaller


def _give_up(why: str, folder: "RunFolder", is_first_process: bool) -> NoReturn:
    """Ends a run that every process of the job gives up at the same place. Raises GuardsError in the first one."""
    from cucafera.training.callbacks.guards import GuardsError

    if not is_first_process:
        _leave(EXIT_DIVERGED, is_first_process)
    folder.note("stopped", saved_step=folder.checkpoints.newest_step(), why=why)
    raise GuardsError(why)


def _leave(code: int, is_first_process: bool) -> NoReturn:
    """Ends a process of a job whose processes all end here.

    The first one's exit code is the job's. Another's would make Lightning kill the first before it has said its word.
    """
    sys.exit(code if is_first_process else 0)


def _session(
    config: Config,
    overrides: list[str],
    hardware: "Hardware",
    folder: "RunFolder",
    interruption: "Interruption",
    is_first_process: bool,
    left_out: set[int],
    is_ours: bool,
) -> float:
    """Trains from the last checkpoint, or the beginning, to the end, a stop, a rollback or the end of the memory.

    `is_ours` says that this process has trained in the folder before.
    """
    import lightning.pytorch as pl
    import torch

    from cucafera.data.conversations import ChatDataModule
    from cucafera.data.packed import PackedDataModule
    from cucafera.interop.trained import tokenizer_to_begin_with, weights_to_begin_with
    from cucafera.training.module import LanguageModel
    from cucafera.training.run_folder import is_within
    from cucafera.training.trainer import build_callbacks, build_trainer, describe_plan, disk_problem

    resumed = folder.checkpoint_to_resume(config, is_ours)
    before = resumed.state if resumed else None
    if config.init_from and config.tokenizer.path is None:
        # A run that has begun needs nothing any more of the run that it began with.
        config.tokenizer.path = str(folder.tokenizer if resumed else tokenizer_to_begin_with(config))
    initial = weights_to_begin_with(config) if config.init_from and not resumed else None
    first_step, expected = 0, {}
    if before:
        first_step, expected = before["steps_done"], before["identity"]
        left_out = left_out | set(before["left_out_batches"])
    elif initial:
        expected = {"tokenizer": initial.tokenizer}
    expected = {key: value for key, value in expected.items() if not is_within(key, config.resume_despite)}
    left_out_batches = sorted(left_out)
    data_module = ChatDataModule if config.data.kind == "conversations" else PackedDataModule
    data = data_module(
        config, first_step, hardware.num_workers, hardware.accelerator == "cuda", expected, left_out_batches
    )
    if config.epochs is not None:
        if before and before["config"]["epochs"] == config.epochs:
            config.budget_tokens = before["config"]["budget_tokens"]
        else:
            config.budget_tokens = budget_of_epochs(config, data)
    callbacks = build_callbacks(config, hardware, folder, before, left_out_batches, interruption, overrides)
    if before and first_step >= config.total_steps:
        callbacks.restore(before)
        return _told_again(config, hardware, folder, callbacks, first_step, is_first_process)

    pl.seed_everything(config.seed, verbose=False)
    torch.set_float32_matmul_precision("high")
    module = LanguageModel(config, hardware)
    if initial:
        adapters = {name: value for name, value in module.state_dict().items() if ".lora_" in name}
        module.load_state_dict(adapters | initial.weights)
    trainer = build_trainer(config, hardware, folder, callbacks, first_step)
    if is_first_process:
        log.info("%s", describe_plan(config, hardware, first_step))
        if before:
            warn_of_another_horizon(config, before["config"])
        if problem := disk_problem(config, folder, module):
            log.warning("%s", problem)
    if trainer.world_size == 1:
        data.prepare_data()  # Lightning would do it in `fit`, and end Ctrl-C with code 1 and no word
        data.setup()  # what is wrong with the text is known before an earlier run is erased
    if is_first_process:
        folder.begin(config, overrides, first_step if before else None)
        folder.note_start(config, overrides, dataclasses.asdict(hardware), resumed)
    checkpoint = resumed.path if resumed else None
    del resumed, before, initial  # training would keep a second copy of the weights
    interruption.take_over()
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return _ended(config, hardware, folder, callbacks, module.steps_done, is_first_process)


def _told_again(
    config: Config, hardware: "Hardware", folder: "RunFolder", callbacks: "Callbacks", step: int, is_first_process: bool
) -> float:
    """What a complete run says when it is started once more."""
    from cucafera.training.report import collect_metrics, terminal_report

    metrics = folder.read_metrics()
    is_told = metrics is not None and metrics["steps"] == step
    if metrics is None or not is_told:  # it was killed between its last checkpoint and its report
        metrics = collect_metrics(config, hardware, callbacks)
    if is_first_process:
        log.info(
            "This run is complete. Train longer with a larger budget_tokens or epochs, begin anew with "
            "resume=overwrite, or choose another name."
        )
        if not is_told:
            _complete(metrics, folder)
        log.info("%s", terminal_report(metrics, folder))
    return float(metrics["validation"][-1]["bpb"])


def _complete(metrics: dict[str, Any], folder: "RunFolder") -> None:
    from cucafera.training.report import write_report

    write_report(metrics, folder)
    folder.note("completed", step=metrics["steps"], bpb=metrics["validation"][-1]["bpb"])


def _ended(
    config: Config, hardware: "Hardware", folder: "RunFolder", callbacks: "Callbacks", step: int, is_first_process: bool
) -> float:
    """What a run says when training has ended, by itself or by a signal or limit."""
    from cucafera.training.report import collect_metrics, terminal_report

    interruption, writer = callbacks.interruption, callbacks.checkpoints.writer
    if interruption.exit_code is not None:
        if is_first_process:
            folder.note("stopped", step=step, saved_step=writer.saved_step, why=interruption.reason)
            log.info("%s", stop_line(interruption.reason, step, writer.saved_step))
        _leave(interruption.exit_code, is_first_process)
    if writer.failure is not None:
        why = writer.failure.strerror or str(writer.failure)
        folder.note("stopped", step=step, saved_step=writer.saved_step, why=f"the result could not be written: {why}")
        raise UserError(
            f"training is complete, but its result could not be written to {folder.checkpoints.path}: "
            f"{why}. Make room there: the same command "
            + (f"goes on after step {writer.saved_step:,}" if writer.saved_step else "begins again")
        )
    metrics = collect_metrics(config, hardware, callbacks)
    if is_first_process:
        _complete(metrics, folder)
        log.info("%s", terminal_report(metrics, folder))
    return float(metrics["validation"][-1]["bpb"])


def stop_line(reason: str, step: int | None, saved_step: int | None) -> str:
    """What a run that was stopped says last, and how it goes on.

    Args:
        reason: The signal or limit.
        step: The step that should have been saved; None if it was not to be.
        saved_step: The last one that is saved.
    """
    if saved_step == step:
        return f"Stopped by {reason} after step {step:,}, and saved; the same command goes on from there."
    whence = f"goes on after step {saved_step:,}" if saved_step else "begins again"
    lost = f" after step {step:,}, which could not be saved" if step is not None else ""
    return f"Stopped by {reason}{lost}; the same command {whence}."


def budget_of_epochs(config: Config, data: "WindowDataModule[Any]") -> int:
    """Tokens of the whole steps that show the training data `epochs` times at least."""
    data.prepare_data()
    data.setup()
    assert config.epochs is not None
    steps = data.steps_of(config.epochs)
    if config.schedule.warmup_steps > (config.schedule.horizon_steps or steps):
        raise UserError(
            f"epochs={config.epochs:g} come to {steps:,} steps of {int(config.batch_tokens):,} tokens, fewer than "
            f"schedule.warmup_steps={config.schedule.warmup_steps}: lower it or batch_tokens, or train for more epochs"
        )
    return steps * int(config.batch_tokens)


def warn_of_another_horizon(config: Config, before: dict[str, Any]) -> None:
    """Says so if a run goes on with another budget whose end the learning rate follows."""
    steps_before = int(before["budget_tokens"]) // int(before["batch_tokens"])
    follows_budget = config.schedule.horizon_steps is None and config.schedule.name != "constant"
    if follows_budget and steps_before != config.total_steps:
        log.warning(
            "The budget was %s steps and is %s now, and the learning rate follows it: it does not go on from where it "
            "was, but as if this budget had been given from the start. schedule.horizon_steps=%s keeps it.",
            f"{steps_before:,}", f"{config.total_steps:,}", steps_before,
        )  # fmt: skip


if __name__ == "__main__":
    # Under its own name, so that the launchers of sweeps find `job` in other processes too.
    from cucafera.run import main as front_door

    front_door()
