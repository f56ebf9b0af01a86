"""The run folder: configuration, tokenizer, checkpoints, TensorBoard events, metrics, report and history of a run."""

import contextlib
import dataclasses
import json
import logging
import platform
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cucafera.config.branch import config_as_recorded, cooldown_schedule, run_and_step
from cucafera.config.errors import UserError
from cucafera.config.fields import flat, format_value
from cucafera.config.files import config_text, is_as_written, with_checksum
from cucafera.config.rules import cooldown_problem
from cucafera.config.schema import Config
from cucafera.runs.checkpoints import (
    UNFINISHED,
    CheckpointError,
    CheckpointFolder,
    DamagedCheckpointError,
    best_of,
    read_checkpoint,
    read_marker,
    verify,
)
from cucafera.runs.compatibility import changed_keys, check_branch_compatible, check_config_compatible
from cucafera.runs.history import (
    FIRST_CHECKPOINT,
    OUT_OF_MEMORY,
    RESUMED,
    STARTED,
    add_event,
    append_event,
    has_event,
    has_no_checkpoint,
    memory_facts,
    read_events,
)
from cucafera.runs.locate import check_not_gguf
from cucafera.runs.lock import LOCK
from cucafera.runs.results import read_evaluation, read_metrics
from cucafera.storage import PARTIAL, list_folder, read_small_file, write_text

if TYPE_CHECKING:
    from cucafera.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

EVENTS = "events.out.tfevents."
"""Prefix of the names of TensorBoard's event files."""


class StartingPoint(NamedTuple):
    """The checkpoint that a run resumes from, its own; or that a branch begins with, of another run.

    Attributes:
        path: Its file.
        state: Its content.
        is_own: True if the run resumes.
        damaged: What is wrong with each later checkpoint, for which this one is the fallback.
    """

    path: Path
    state: dict[str, Any]
    is_own: bool
    damaged: Sequence[str] = ()


class RunFolder:
    """One folder under outputs/.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = CheckpointFolder(path / "checkpoints")
        self.config = path / "config.yaml"
        self.overrides = path / "overrides.yaml"
        self.history = path / "history.jsonl"
        self.lock = path / LOCK
        self.tokenizer = path / "tokenizer.json"
        self.tokenizer_config = path / "tokenizer_config.json"
        self.metrics = path / "metrics.json"
        self.report = path / "report.md"
        self.evaluation = path / "evaluation.json"

    def checkpoint_to_resume(self, config: Config, has_trained: bool) -> StartingPoint | None:
        """Return the newest checkpoint that is complete and undamaged; None if the run starts from scratch.

        Args:
            config: The run.
            has_trained: This process has trained in the folder before, and resumes after a rollback or out of memory:
                resume=overwrite has already erased the earlier run.

        Raises:
            UserError: the folder holds a run with another configuration, or only damaged checkpoints; or it holds
                none and resume=required, or traces of a run that has saved some; or it cannot be read.
        """
        marked = self.checkpoints.marked()
        overwritten = config.resume == "overwrite" and not has_trained
        if overwritten or not marked:
            if config.resume == "required":
                raise UserError(f"resume=required, but {self.path} holds no checkpoint to resume from")
            if not overwritten:
                self._check_nothing_is_lost(has_trained)
                for path in self.checkpoints.unmarked():
                    log.warning(
                        "%s has no marker, so it was never completed: renamed to %s%s", path, path.name, UNFINISHED
                    )
            return None
        damaged = []
        for path in reversed(marked):
            try:
                state = read_checkpoint(path)
            except DamagedCheckpointError as error:
                log.warning("%s; falling back to the checkpoint before it", error)
                damaged.append(str(error))
                continue
            check_config_compatible(config, state["config"], self.path)
            if not has_trained and self._config_was_edited():
                self._report_edited_config(config, state["config"])
            if not has_trained and (broken := sum(event is None for event in read_events(self.history))):
                log.warning("%s: lines that are damaged or were edited, and are not used: %d", self.history, broken)
            return StartingPoint(path, state, True, damaged)
        raise UserError(
            f"{self.path} holds checkpoints, but none of them can be used; resume=overwrite erases them and starts "
            "from scratch"
        )

    def _check_nothing_is_lost(self, has_trained: bool) -> None:
        """Raise UserError if the folder, which shows no checkpoint, is not that of a run that has not saved any yet.

        The checkpoints may be on a disk that is not mounted, or were deleted: to start from scratch would erase the
        curves of that run.
        """
        foreign = [] if has_trained else self._files_of_another_run()
        if foreign:
            raise UserError(
                f"{self.path} holds no checkpoint to resume from, but {', '.join(map(str, foreign))}. Choose another "
                "name=..., or erase that run with resume=overwrite"
            )
        written = (self.history, self.config, self.evaluation, *self.event_files())
        traces = [
            path.name
            for path in written
            if (path.exists() or path.is_symlink()) and path.lstat().st_size  # a full disk leaves empty ones
        ]
        if traces and not has_no_checkpoint(self.history):
            raise UserError(
                f"{self.path} holds a run ({', '.join(traces[:3])}), and no checkpoint to resume from: "
                f"{self.checkpoints.why_none()}. If its checkpoints are elsewhere, such as on a disk that is not "
                "mounted, bring them back; or choose another name=..., or erase that run with resume=overwrite"
            )

    def _report_edited_config(self, config: Config, before: Mapping[str, Any]) -> None:
        """Log the values of config.yaml that neither the checkpoint nor the command line gives."""
        edits = "it is damaged"
        with contextlib.suppress(OSError, ValueError, YAMLError, OmegaConfBaseException, RecursionError):
            written: Any = OmegaConf.to_container(OmegaConf.create(config_text(self.config)), resolve=False)
            given, trained = dict(flat(dataclasses.asdict(config))), dict(flat(dict(before)))
            edits = ", ".join(
                f"{key}={format_value(value)}"
                for key, value in flat(written)
                if key not in ("run_dir", "tokenizer.path") and value not in (given.get(key), trained.get(key))
            )
        log.warning(
            "%s was edited, which changes nothing: settings are given on the command line. Not used: %s",
            self.config, edits or "comments or layout",
        )  # fmt: skip

    def _files_of_another_run(self) -> list[Path]:
        """Return the files that a run that failed before its first checkpoint cannot have left."""
        ours = (".ckpt", PARTIAL, UNFINISHED)
        found = [path for path in self.checkpoints.entries() if path.suffix not in ours]
        return found + [path for path in (self.metrics, self.report) if path.exists() or path.is_symlink()]

    def event_files(self) -> list[Path]:
        """Return the TensorBoard event files, sorted. Raises UserError if the folder cannot be read."""
        try:
            return [path for path in list_folder(self.path) if path.name.startswith(EVENTS)]
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from error

    def begin(
        self, config: Config, overrides: Sequence[str], hardware: Mapping[str, Any], start: StartingPoint | None
    ) -> None:
        """Record the start, and erase what an earlier run left, or what is later than the resumed step.

        Nothing is erased before everything that this start writes is on disk.

        Args:
            config: The run.
            overrides: The command line.
            hardware: The settings of the trainer with every `auto` resolved, as plain data.
            start: The checkpoint that it resumes from, or begins with; None if it starts from scratch or with the
                weights of init_from.

        Raises:
            UserError: the folder cannot be written.
        """
        resumed = start if start and start.is_own else None
        event, facts = RESUMED if resumed else STARTED, _start_facts(config, overrides, hardware, start)
        overwrites = resumed is None and config.resume == "overwrite"
        with self._errors_as_sentences():
            self.checkpoints.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.checkpoints.path, buffering=0) as file:
                file.write(b"can be written")
            # A start that fails here must leave a history that is true: a new run has saved nothing yet, and one that
            # is to be overwritten is still there.
            if not overwrites:
                append_event(self.history, event, facts)
            write_text(self.config, with_checksum(OmegaConf.to_yaml(dataclasses.asdict(config))))
            write_text(self.overrides, OmegaConf.to_yaml(OmegaConf.create(list(overrides))))
            if overwrites:
                append_event(self.history, event, facts)
            if resumed:
                self.checkpoints.remove_after(resumed.state["steps_done"])
            else:
                self.checkpoints.on_save = self._note_first_checkpoint
                self._erase(checkpoints=overwrites)

    def _note_first_checkpoint(self, step: int) -> None:
        if add_event(self.history, FIRST_CHECKPOINT, {"step": step}):
            self.checkpoints.on_save = lambda step: None

    @contextmanager
    def _errors_as_sentences(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def _erase(self, checkpoints: bool) -> None:
        """Remove what an earlier run left. Without `checkpoints`, there are only incomplete ones, which are renamed."""
        # The report goes first, and can be written again as long as there are checkpoints; curves cannot.
        for path in (self.metrics, self.report, self.evaluation):
            path.unlink(missing_ok=True)
        if checkpoints:
            self.checkpoints.remove_all()
        else:
            self.checkpoints.set_aside_unmarked()
        for path in self.event_files():
            path.unlink(missing_ok=True)

    def note(self, event: str, **facts: Any) -> None:
        """Append an event to the history of the run."""
        add_event(self.history, event, facts)

    def note_out_of_memory(self, config: Config, hardware: Mapping[str, Any]) -> None:
        """Append to the history that a device ran out of memory; the arguments are those of `memory_facts`."""
        self.note(OUT_OF_MEMORY, **memory_facts(config, hardware))

    def ran_out_of_memory(self, config: Config, hardware: Mapping[str, Any]) -> bool:
        """True if the history says that a device ran out of memory with the same `memory_facts`."""
        return has_event(self.history, OUT_OF_MEMORY, memory_facts(config, hardware))

    def read_config(self) -> dict[str, Any]:
        """Return the content of config.yaml, as it is written; a warning says if it was edited.

        Raises:
            UserError: it cannot be read, or holds no configuration.
        """
        try:
            config = OmegaConf.to_container(OmegaConf.create(config_text(self.config)), resolve=False)
        except OSError as error:
            raise UserError(f"{self.config} cannot be read: {error.strerror or error}") from error
        except (ValueError, YAMLError, OmegaConfBaseException, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.config} cannot be read: {reason}") from error
        if not isinstance(config, dict) or not config:
            raise UserError(f"{self.config} is empty, or not a configuration")
        if self._config_was_edited():
            log.warning("%s was edited since the run wrote it: it may not say what was trained", self.config)
        return {str(key): value for key, value in config.items()}

    def checked_config(self) -> Config:
        """Return the content of config.yaml with the types of the schema. Raises UserError if it does not fit them."""
        return config_as_recorded(self.read_config(), str(self.config))

    def _config_was_edited(self) -> bool:
        try:
            return not is_as_written(read_small_file(self.config).decode(errors="replace"))
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def read_metrics(self) -> dict[str, Any] | None:
        """Return the content of metrics.json; see `results.read_metrics`."""
        return read_metrics(self.metrics)

    def read_evaluation(self) -> list[dict[str, Any]]:
        """Return the results in evaluation.json; see `results.read_evaluation`."""
        return read_evaluation(self.evaluation)

    def write_tokenizer(self, tokenizer: "Tokenizer", description: Mapping[str, Any]) -> None:
        """Write the tokenizer, and tokenizer_config.json, with which transformers loads it.

        Args:
            tokenizer: The tokenizer.
            description: The content of tokenizer_config.json; see `chatml.tokenizer_description`.

        Raises:
            UserError: they cannot be written.
        """
        with self._errors_as_sentences():
            tokenizer.save(self.tokenizer)
            write_text(self.tokenizer_config, json.dumps(description, indent=2) + "\n")


def _start_facts(
    config: Config, overrides: Sequence[str], hardware: Mapping[str, Any], start: StartingPoint | None
) -> dict[str, Any]:
    """Return what the history says of a start: on which machine, and what changed since the last one."""
    facts: dict[str, Any] = {"step": start.state["steps_done"] if start else 0}
    if start:
        changes = changed_keys(config, start.state["config"])
        facts["changed"] = {key: list(values) for key, values in changes.items()}
        facts |= {"damaged": list(start.damaged)} if start.is_own else {"branch_of": str(start.path)}
    return facts | {
        "overrides": list(overrides),
        "host": socket.gethostname(),
        "hardware": dict(hardware),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
    }


def checkpoint_of(source: str, key: str) -> Path:
    """Return the checkpoint that a path names: a file, or of a run folder the best, or else the newest.

    Args:
        source: The path.
        key: Prefix of messages: how the user gave the path, such as "init_from=".

    Raises:
        UserError: there is none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        folder = RunFolder(path).checkpoints
        complete = folder.complete()
        if not complete:
            raise UserError(f"{key}{source}: the folder holds no checkpoint: {folder.why_none()}")
        for other in {*folder.marked()} - {checkpoint.path for checkpoint in complete}:
            log.warning("%s is left out: %s", other, _problem_of(other))
        return (best_of(complete) or complete[-1]).path
    if not path.exists():
        raise UserError(f"{key}{source}: there is no such run folder or checkpoint")
    check_not_gguf(source, key)
    return path


def checkpoint_to_branch(config: Config) -> Path:
    """Return the checkpoint that a branch begins with, after a look at its marker.

    Raises:
        UserError: it is missing or damaged; the message names those that there are.
    """
    assert config.init_from is not None and config.schedule.cooldown_start_step is not None
    run, _ = run_and_step(config.init_from)
    folder = CheckpointFolder(run / "checkpoints")
    path = folder.file_at(config.schedule.cooldown_start_step)
    try:
        read_marker(path)
        if not path.is_file():
            raise DamagedCheckpointError(f"{path} does not exist")
    except DamagedCheckpointError as error:
        steps = ", ".join(f"{checkpoint.step:,}" for checkpoint in folder.complete()[-3:])
        raise UserError(
            f"{error}. {f'{run} has checkpoints of the steps {steps}' if steps else f'{run} has no other'}; "
            "callbacks.keep_every_steps keeps some for good"
        ) from error
    return path


def read_branch_point(config: Config, given: Sequence[str]) -> StartingPoint:
    """Return the checkpoint that a branch begins with, and give the configuration its schedule.

    The config.yaml of the parent may be that of a later start, with another budget or schedule.

    Args:
        config: The branch.
        given: Keys of the optimizer that the command line gives.

    Raises:
        UserError: the checkpoint cannot be used, has no optimizer state, or is of a run with other settings.
    """
    path = checkpoint_to_branch(config)
    state = read_checkpoint(path)
    if not state.get("optimizer_states"):
        raise UserError(
            f"{path} holds no optimizer state, only weights: a cooldown continues a run with its optimizer state"
        )
    schedule = config.schedule
    assert schedule.cooldown_start_step is not None
    parent = config_as_recorded(state["config"], str(path))
    config.schedule = cooldown_schedule(parent, schedule.cooldown_start_step, schedule.cooldown_steps)
    check_branch_compatible(config, state["config"], path, given)
    if problem := cooldown_problem(config):
        raise UserError(problem)
    return StartingPoint(path, state, False)


def read_checkpoint_of(source: str, key: str) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint that a path names, and its content; see `checkpoint_of`.

    Raises:
        UserError: there is none, or it cannot be read; the message names another one of the folder that is intact.
    """
    path = checkpoint_of(source, key)
    try:
        return path, read_checkpoint(path, mapped=True)
    except DamagedCheckpointError as error:
        others = [other.path for other in reversed(CheckpointFolder(path.parent).complete()) if other.path != path]
        intact = next((other for other in others if _problem_of(other) is None), None)
        advice = f". There is also {intact}: name it instead of the folder" if intact else ""
        raise UserError(f"{error}{advice}") from error


def _problem_of(path: Path) -> str | None:
    """Return what is wrong with a checkpoint; None if it is intact."""
    try:
        verify(path)
    except CheckpointError as error:
        return str(error)
    return None


def tokenizer_path_of(source: Path) -> Path:
    """Return the path of the tokenizer of a run folder, or of the run folder that a checkpoint file is in."""
    return RunFolder(source.parent.parent if source.is_file() else source).tokenizer
