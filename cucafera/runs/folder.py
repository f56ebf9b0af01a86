"""The run folder: configuration, tokenizer, checkpoints, TensorBoard events, metrics, report and history of a run."""

import json
import logging
import platform
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import OmegaConf

from cucafera.config.errors import UserError
from cucafera.config.schema import Config
from cucafera.runs.checkpoints import UNFINISHED, CheckpointFolder, DamagedCheckpointError, best_of, read_checkpoint
from cucafera.runs.compatibility import changed_keys, check_config_compatible
from cucafera.runs.history import OUT_OF_MEMORY, RESUMED, STARTED, add_event, has_event, memory_facts
from cucafera.storage import PARTIAL, write_text

if TYPE_CHECKING:
    from cucafera.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

EVENTS = "events.out.tfevents."
"""Prefix of the names of TensorBoard's event files."""


class ResumedCheckpoint(NamedTuple):
    """The checkpoint that a run resumes from.

    Attributes:
        path: Its file.
        state: Its content.
        damaged: What is wrong with each later checkpoint, for which this one is the fallback.
    """

    path: Path
    state: dict[str, Any]
    damaged: list[str]


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
        self.lock = path / "lock"
        self.tokenizer = path / "tokenizer.json"
        self.tokenizer_config = path / "tokenizer_config.json"
        self.metrics = path / "metrics.json"
        self.report = path / "report.md"
        self.evaluation = path / "evaluation.json"

    def checkpoint_to_resume(self, config: Config, has_trained: bool) -> ResumedCheckpoint | None:
        """Return the newest checkpoint that is complete and undamaged; None if the run starts from scratch.

        Args:
            config: The run.
            has_trained: This process has trained in the folder before, and resumes after a rollback or out of memory:
                resume=overwrite has already erased the earlier run.

        Raises:
            UserError: the folder holds a run with another configuration, or only damaged checkpoints; or it holds
                none and resume=required.
        """
        marked = self.checkpoints.marked()
        if (config.resume == "overwrite" and not has_trained) or not marked:
            if config.resume == "required":
                raise UserError(f"resume=required, but {self.path} holds no checkpoint to resume from")
            if config.resume == "auto" and not has_trained and (foreign := self._files_of_another_run()):
                raise UserError(
                    f"{self.path} holds no checkpoint to resume from, but {', '.join(map(str, foreign))}. Choose "
                    "another name=..., or erase that run with resume=overwrite"
                )
            for path in self.checkpoints.unmarked():
                log.warning("%s has no marker, so it was never completed: renamed to %s%s", path, path.name, UNFINISHED)
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
            return ResumedCheckpoint(path, state, damaged)
        raise UserError(
            f"{self.path} holds checkpoints, but none of them can be used; resume=overwrite erases them and starts "
            "from scratch"
        )

    def _files_of_another_run(self) -> list[Path]:
        """Return the files that a run that failed before its first checkpoint cannot have left."""
        ours = (".ckpt", PARTIAL, UNFINISHED)
        found = [path for path in self.checkpoints.path.glob("*") if path.suffix not in ours]
        return found + [path for path in (self.metrics, self.report) if path.exists()]

    def begin(self, config: Config, overrides: Sequence[str], resumed_step: int | None) -> None:
        """Write the configuration, and erase what an earlier run left, or what is later than the resumed step.

        Args:
            config: The run.
            overrides: The command line.
            resumed_step: The step that it resumes from; None if it starts from scratch.

        Raises:
            UserError: the folder cannot be written.
        """
        with self._errors_as_sentences():
            if resumed_step is None:
                self._erase(checkpoints=config.resume == "overwrite")
            else:
                self.checkpoints.remove_after(resumed_step)
            self.checkpoints.path.mkdir(parents=True, exist_ok=True)
            write_text(self.config, OmegaConf.to_yaml(OmegaConf.structured(config)))
            write_text(self.overrides, OmegaConf.to_yaml(OmegaConf.create(list(overrides))))

    @contextmanager
    def _errors_as_sentences(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def _erase(self, checkpoints: bool) -> None:
        """Remove what an earlier run left. Without `checkpoints`, there are only incomplete ones, which are renamed."""
        for path in (self.metrics, self.report, self.evaluation, *self.path.glob(EVENTS + "*")):
            path.unlink(missing_ok=True)
        if checkpoints:
            self.checkpoints.remove_all()
        else:
            self.checkpoints.set_aside_unmarked()

    def note(self, event: str, **facts: Any) -> None:
        """Append an event to the history of the run."""
        add_event(self.history, event, facts)

    def note_start(
        self, config: Config, overrides: Sequence[str], hardware: Mapping[str, Any], resumed: ResumedCheckpoint | None
    ) -> None:
        """Append the start of this process to the history: on which machine, and what changed since the last start.

        Args:
            config: The run.
            overrides: The command line.
            hardware: The settings of the trainer with every `auto` resolved, as plain data.
            resumed: The checkpoint that it resumes from; None if it starts from scratch.
        """
        facts: dict[str, Any] = {"step": resumed.state["steps_done"] if resumed else 0}
        if resumed:
            changes = changed_keys(config, resumed.state["config"])
            facts["changed"] = {key: list(values) for key, values in changes.items()}
            facts["damaged"] = resumed.damaged
        self.note(
            RESUMED if resumed else STARTED,
            **facts,
            overrides=list(overrides),
            host=socket.gethostname(),
            hardware=dict(hardware),
            versions={"python": platform.python_version(), "torch": version("torch")},
        )

    def note_out_of_memory(self, config: Config, hardware: Mapping[str, Any]) -> None:
        """Append to the history that a device ran out of memory; the arguments are those of `memory_facts`."""
        self.note(OUT_OF_MEMORY, **memory_facts(config, hardware))

    def ran_out_of_memory(self, config: Config, hardware: Mapping[str, Any]) -> bool:
        """True if the history says that a device ran out of memory with the same `memory_facts`."""
        return has_event(self.history, OUT_OF_MEMORY, memory_facts(config, hardware))

    def read_metrics(self) -> dict[str, Any] | None:
        """Return the content of metrics.json; None if it is missing or unreadable."""
        try:
            metrics: dict[str, Any] = json.loads(self.metrics.read_bytes())
        except (OSError, ValueError):
            return None
        return metrics if isinstance(metrics, dict) and "steps" in metrics else None

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
        complete = RunFolder(path).checkpoints.complete()
        if not complete:
            raise UserError(f"{key}{source}: the folder holds no checkpoint")
        return (best_of(complete) or complete[-1]).path
    if not path.exists():
        raise UserError(f"{key}{source}: there is no such run folder or checkpoint")
    return path


def read_checkpoint_of(source: str, key: str) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint that a path names, and its content; see `checkpoint_of`.

    Raises:
        UserError: there is none, or it cannot be read; the message names the other checkpoints of the folder.
    """
    path = checkpoint_of(source, key)
    try:
        return path, read_checkpoint(path, mapped=True)
    except DamagedCheckpointError as error:
        others = [str(other.path) for other in CheckpointFolder(path.parent).complete() if other.path != path]
        advice = f". There is also {' and '.join(others)}: name it instead of the folder" if others else ""
        raise UserError(f"{error}{advice}") from error


def tokenizer_path_of(source: Path) -> Path:
    """Return the path of the tokenizer of a run folder, or of the run folder that a checkpoint file is in."""
    return RunFolder(source.parent.parent if source.is_file() else source).tokenizer
