"""A training job: resume or start, fit, and what follows a rollback, a full GPU, a signal or the end."""

import dataclasses
import gc
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only

from cucafera.config.command_line import differences_from_defaults
from cucafera.config.errors import EXIT_DIVERGED, EXIT_WORKER_LOST, UserError
from cucafera.config.registry import OPTIMIZERS
from cucafera.config.schema import Config
from cucafera.data.run_data import RunData
from cucafera.data.sources import source_notes
from cucafera.interop.trained import InitialWeights, initial_tokenizer, load_initial_weights
from cucafera.objectives import objective_of
from cucafera.quantities import number_of
from cucafera.runs.compatibility import matches_key
from cucafera.runs.folder import RunFolder, StartingPoint, read_branch_point
from cucafera.runs.report import terminal_report, write_report
from cucafera.training.callbacks.checkpoints import is_lost_connection
from cucafera.training.callbacks.guards import GuardsError, RollbackRequest
from cucafera.training.callbacks.interruption import Interruption
from cucafera.training.checkpoint_writer import reason_of
from cucafera.training.data_module import WindowDataModule
from cucafera.training.hardware import Hardware
from cucafera.training.module import LanguageModel
from cucafera.training.results import collect_metrics
from cucafera.training.trainer import Callbacks, build_callbacks, build_trainer, describe_plan, disk_problem

log = logging.getLogger(__name__)


class ProcessLostError(UserError):
    """Another process of the job has died."""

    exit_code = EXIT_WORKER_LOST


class Job:
    """One start of the run command, in one of its processes.

    Args:
        config: What to train; its run_dir is the run folder.
        overrides: The command line, for the record.
        hardware: Where and how to compute.
        started: time.monotonic() at the start of the command, for max_time.

    Attributes:
        is_first_process: True in the process that writes and logs; every process of a job does the same otherwise.
        skipped_batches: Numbers of batches that rollbacks of this process have skipped.
    """

    def __init__(self, config: Config, overrides: Sequence[str], hardware: Hardware, started: float) -> None:
        self.config = config
        self.overrides = list(overrides)
        self.hardware = hardware
        self.objective = objective_of(config)
        self.folder = RunFolder(Path(config.run_dir))
        self.interruption = Interruption(config, started)
        # Lightning learns the node rank of a process that a person started only when it has a Trainer.
        rank = rank_zero_only.rank  # type: ignore[attr-defined]
        self.is_first_process = rank == 0 and os.environ.get("NODE_RANK", "0") == "0"
        self.skipped_batches: set[int] = set()
        self._rollbacks: Counter[int] = Counter()
        self._has_trained = False

    def run(self) -> float:
        """Train to the end of the budget. The run folder is locked by the caller.

        Returns:
            The last validation's primary metric.

        Raises:
            UserError: A problem that the user can fix.
            SystemExit: A signal or max_time stopped training; with the exit code that says so.
        """
        while self.folder.ran_out_of_memory(self.config, dataclasses.asdict(self.hardware)):
            smaller = self.hardware.with_less_memory(self.config)
            if smaller is None:
                break
            self.hardware = smaller
        with self.interruption.restore_signal_handlers():
            while True:
                try:
                    return self._fit()
                except RollbackRequest as rollback:
                    self._roll_back(rollback)
                except GuardsError as error:
                    self._give_up(str(error))
                except torch.OutOfMemoryError as error:
                    self._use_less_memory(error)
                except RuntimeError as error:
                    if not is_lost_connection(error):
                        raise
                    self._stop_without_process(error)
                self._has_trained = True
                gc.collect()  # frees model and optimizer before the next ones are built
                if self.hardware.compile:
                    torch.compiler.reset()  # or the next model would be compiled for dynamic shapes
                torch.cuda.empty_cache()

    def _fit(self) -> float:
        """Build everything and train once, from a checkpoint, the weights of init_from, or scratch.

        Raises:
            RollbackRequest: Continue from the last checkpoint without some batches.
            torch.OutOfMemoryError: The GPU has too little memory for these settings.
        """
        config, folder = self.config, self.folder
        start = self._starting_point()
        resumes = start is not None and start.is_own
        state = start.state if start else None
        first_step = state["steps_done"] if state else 0
        skipped_batches = sorted(self.skipped_batches.union(state["skipped_batches"] if state else ()))
        initial = self._set_initial_model(start)
        # A budget in epochs is known only with the data. Otherwise the plan is shown, and wrong settings are refused,
        # before hours of tokenizing.
        data = self._open_data(state, initial) if config.epochs is not None else None
        callbacks = build_callbacks(
            config,
            self.hardware,
            folder,
            start,
            skipped_batches,
            self.interruption,
            self.overrides,
            differences_from_defaults(config),
        )
        if state and first_step >= config.total_steps:
            callbacks.restore(state)
            return self._report_completed(callbacks, first_step)

        pl.seed_everything(config.seed, verbose=False)
        torch.set_float32_matmul_precision("high")
        module = LanguageModel(config, self.hardware)
        if initial:
            adapters = {name: value for name, value in module.state_dict().items() if ".lora_" in name}
            module.load_state_dict(adapters | initial.weights)
        trainer = build_trainer(config, self.hardware, folder, callbacks, first_step)
        if self.is_first_process:
            log.info("%s", describe_plan(config, self.hardware, first_step if resumes else 0))
            if initial and (doubt := self.objective.initial_problem(config.objective, initial.chats)):
                log.warning("init_from=%s: %s", config.init_from, doubt)
            if state and resumes:
                warn_of_changed_horizon(config, state["config"])
            if problem := disk_problem(config, folder, module):
                log.warning("%s", problem)
        if data is None:
            data = self._open_data(state, initial)
        data_module = WindowDataModule(
            data,
            first_step,
            self.hardware.num_workers,
            self.hardware.accelerator == "cuda",
            skipped_batches,
            self.interruption.stop_without_worker,
        )
        if self.is_first_process:  # only now, when every input has been read, is an earlier run in the folder erased
            folder.begin(config, self.overrides, dataclasses.asdict(self.hardware), start)
        checkpoint = start.path if start else None
        del start, state, initial  # training would keep a second copy of the weights
        self.interruption.install_signal_handlers()
        trainer.fit(module, data_module, ckpt_path=checkpoint, weights_only=True)
        return self._finish(callbacks, module.steps_done)

    def _starting_point(self) -> StartingPoint | None:
        """Return the checkpoint whose complete training state the run continues; None if there is none.

        A run that has saved one resumes from its own. A branch, such as a cooldown, begins with that of another run.
        Every other run begins at step 0, with the weights of init_from or with random ones.
        """
        resumed = self.folder.checkpoint_to_resume(self.config, self._has_trained)
        if resumed or self.config.schedule.cooldown_steps is None:
            return resumed
        return read_branch_point(self.config, [text.lstrip("+").partition("=")[0] for text in self.overrides])

    def _set_initial_model(self, start: StartingPoint | None) -> InitialWeights | None:
        """Return the weights of init_from, if they are all that the run takes of it; set the tokenizer they know.

        A run that has started needs nothing of the run that init_from names any more: it has its own copies.
        """
        config = self.config
        if not config.init_from:
            return None
        if config.tokenizer.path is None:
            resumes = start is not None and start.is_own
            config.tokenizer.path = str(self.folder.tokenizer if resumes else initial_tokenizer(config))
        return None if start else load_initial_weights(config)

    def _open_data(self, state: dict[str, Any] | None, initial: InitialWeights | None) -> RunData[Any]:
        """Open the data, check that the weights know it, and derive the budget if it is given in epochs."""
        config = self.config
        expected: Mapping[str, str] = {}
        if state:
            expected = state["fingerprints"]
        elif initial:
            expected = {"tokenizer": initial.tokenizer}
        if self.is_first_process:
            for note in source_notes(config.data.sources):
                log.info("%s", note)
        data = self.objective.open_data(config)
        data.check_fingerprints(
            {key: value for key, value in expected.items() if not matches_key(key, config.resume_allow_changed)}
        )
        if config.epochs is not None:
            if state and state["config"]["epochs"] == config.epochs:
                config.budget_tokens = state["config"]["budget_tokens"]
            else:
                config.budget_tokens = budget_of_epochs(config, data)
        return data

    def _report_completed(self, callbacks: Callbacks, step: int) -> float:
        """Print the report of a run that has already finished, and write it if it is not there."""
        try:
            metrics = self.folder.read_metrics()
        except UserError as error:
            log.warning("%s. It is written again", error)
            metrics = None
        is_current = metrics is not None and metrics["steps"] == step
        if metrics is None or not is_current:  # killed between its last checkpoint and its report
            metrics = collect_metrics(self.config, self.hardware, callbacks)
        if self.is_first_process:
            longer = "Train longer with a larger budget_tokens or epochs, train it again from scratch"
            if self.config.schedule.cooldown_start_step is not None:
                longer = "Cool down another checkpoint, or over other steps, under another name, or do it again"
            log.info("This run is complete. %s with resume=overwrite, or choose another name.", longer)
            if not is_current:
                self._write_report(metrics)
            log.info("%s", terminal_report(metrics, self.folder))
        return self._primary(metrics)

    def _finish(self, callbacks: Callbacks, step: int) -> float:
        """Report the end of training: the result, or why and where it stopped."""
        interruption, writer = self.interruption, callbacks.checkpoints.writer
        if interruption.exit_code is not None:
            if self.is_first_process:
                self.folder.note("stopped", step=step, saved_step=writer.saved_step, reason=interruption.reason)
                log.info("%s", stop_line(self.config, interruption.reason, step, writer.saved_step))
            self._leave(interruption.exit_code)
        if writer.failure is not None:
            why = reason_of(writer.failure)
            self.folder.note(
                "stopped", step=step, saved_step=writer.saved_step, reason=f"the result could not be written: {why}"
            )
            raise UserError(
                f"training is complete, but its result could not be written to {self.folder.checkpoints.path}: {why}. "
                f"Free some space there and run the same command again to {next_start(self.config, writer.saved_step)}"
            )
        metrics = collect_metrics(self.config, self.hardware, callbacks)
        if self.is_first_process:
            self._write_report(metrics)
            log.info("%s", terminal_report(metrics, self.folder))
        return self._primary(metrics)

    def _write_report(self, metrics: dict[str, Any]) -> None:
        write_report(metrics, self.folder)
        result = {self.objective.primary: self._primary(metrics)}
        self.folder.note("completed", step=metrics["steps"], **result)

    def _primary(self, metrics: Mapping[str, Any]) -> float:
        return float(metrics["validation"][-1][self.objective.primary])

    def _roll_back(self, rollback: RollbackRequest) -> None:
        """Prepare to continue from the last checkpoint without the batches that made training fail."""
        saved_step = self.folder.checkpoints.newest_step()
        step = saved_step or self.config.schedule.cooldown_start_step or 0
        if self.interruption.exit_code is not None:
            if self.is_first_process:
                self.folder.note("stopped", saved_step=saved_step, reason=self.interruption.reason)
                log.info("%s. %s", rollback.reason, stop_line(self.config, self.interruption.reason, None, saved_step))
            self._leave(self.interruption.exit_code)
        self._rollbacks[step] += 1
        if self._rollbacks[step] > self.config.callbacks.guards.max_consecutive:
            rates = OPTIMIZERS.get(self.config.optimizer.name).learning_rate_keys
            self._give_up(
                f"{rollback.reason}, and {self._rollbacks[step] - 1} rollbacks to step {step:,} did not help. Lower "
                f"{' and '.join(rates)} and resume with 'resume_allow_changed=[{','.join(rates)}]'"
            )
        self.skipped_batches.update(rollback.batches)
        if self.is_first_process:
            batches = ", ".join(f"{batch:,}" for batch in rollback.batches)
            log.warning("%s: rolling back to step %s, skipping batch %s", rollback.reason, f"{step:,}", batches)
            self.folder.note(
                "rolled back", reason=rollback.reason, to_step=step, skipped_batches=sorted(self.skipped_batches)
            )

    def _use_less_memory(self, error: torch.OutOfMemoryError) -> None:
        """Choose smaller settings after a GPU ran out of memory; the run folder remembers.

        Raises:
            UserError: No smaller settings are allowed, or other processes of the job wait for this one.
        """
        config, hardware = self.config, self.hardware
        if self.is_first_process:
            self.folder.note_out_of_memory(config, dataclasses.asdict(hardware))
        smaller = hardware.with_less_memory(config)
        windows = f"{number_of(hardware.micro_batch_windows, 'window')} at a time"
        if smaller is None:
            advice = (
                "set trainer.micro_batch_windows=auto or to less"
                if hardware.micro_batch_windows > 1
                else "set trainer.activation_checkpointing=auto, or choose a smaller model or sequence_length"
            )
            raise UserError(f"the GPU has too little memory for {windows}: {advice}") from error
        settings = f"{smaller.micro_batch_windows} at a time" + (
            " and activation checkpointing" if smaller.activation_checkpointing else ""
        )
        if hardware.world_size > 1:
            raise UserError(
                f"a GPU has too little memory for {windows}. Run the same command again to resume with {settings}"
            ) from error
        log.warning(
            "The GPU has too little memory for %s: continuing with %s. The result stays the same.", windows, settings
        )
        self.hardware = smaller

    def _give_up(self, why: str) -> NoReturn:
        """End a run that every process of the job gives up at the same step. Raises GuardsError in the first one."""
        if not self.is_first_process:
            self._leave(EXIT_DIVERGED)
        self.folder.note("stopped", saved_step=self.folder.checkpoints.newest_step(), reason=why)
        raise GuardsError(why)

    def _stop_without_process(self, error: RuntimeError) -> NoReturn:
        """End a run of which another process has died. Raises ProcessLostError in the first process."""
        if not self.is_first_process:
            sys.exit(EXIT_WORKER_LOST)
        step = self.folder.checkpoints.newest_step()
        self.folder.note("stopped", saved_step=step, reason="the death of another process of the job")
        raise ProcessLostError(
            f"Another process of this job has died: memory may have run out, or its machine is gone. Run the same "
            f"command again to {next_start(self.config, step)}."
        ) from error

    def _leave(self, code: int) -> NoReturn:
        """Exit; the exit code of the first process is the job's.

        Another code than 0 of another process would make Lightning kill the first one before it has reported.
        """
        sys.exit(code if self.is_first_process else 0)


def next_start(config: Config, saved_step: int | None) -> str:
    """Return what the same command will do, as an infinitive, when a step was saved last."""
    if saved_step:
        return f"resume after step {saved_step:,}"
    branched = config.schedule.cooldown_start_step
    return f"start again after step {branched:,} of {config.init_from}" if branched else "start from scratch"


def stop_line(config: Config, reason: str, step: int | None, saved_step: int | None) -> str:
    """Return the last line of a run that was stopped: what is saved, and how to resume.

    Args:
        config: The run.
        reason: The signal, limit or death.
        step: The step that should have been saved; None if none should.
        saved_step: The last one that is saved.
    """
    if saved_step == step:
        return f"Stopped by {reason} after step {step:,}; checkpoint saved. Run the same command again to resume."
    lost = f" after step {step:,}, which could not be saved" if step is not None else ""
    return f"Stopped by {reason}{lost}. Run the same command again to {next_start(config, saved_step)}."


def budget_of_epochs(config: Config, data: RunData[Any]) -> int:
    """Return the tokens of the fewest steps that show the training data `epochs` times."""
    assert config.epochs is not None
    steps = data.steps_of(config.epochs)
    if config.schedule.warmup_steps > (config.schedule.horizon_steps or steps):
        raise UserError(
            f"epochs={config.epochs:g} give {number_of(steps, 'step')} of "
            f"{number_of(config.batch_tokens, 'token')}, fewer than "
            f"schedule.warmup_steps={config.schedule.warmup_steps}: lower it or batch_tokens, or train for more epochs"
        )
    return steps * config.batch_tokens


def warn_of_changed_horizon(config: Config, before: Mapping[str, Any]) -> None:
    """Warn if a run resumes with another budget whose end the learning rate follows."""
    steps_before = math.floor(before["budget_tokens"]) // int(before["batch_tokens"])
    follows_budget = config.schedule.horizon_steps is None and config.schedule.name != "constant"
    if follows_budget and steps_before != config.total_steps:
        log.warning(
            "The budget was %s and is %s now, and the learning rate follows it: it jumps to the value that it "
            "would have had if this budget had been given from the start. schedule.horizon_steps=%s keeps the old one.",
            number_of(steps_before, "step"), f"{config.total_steps:,}", steps_before,
        )  # fmt: skip
