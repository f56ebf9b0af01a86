"""The run folder: configuration, tokenizer, checkpoints, TensorBoard events, metrics, report and log of a run."""

import dataclasses
import json
import logging
import platform
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf

from cucafera.config import Config, UserError, shown
from cucafera.data.chat import tokenizer_description
from cucafera.data.files import PARTIAL, append, write_text
from cucafera.data.tokenizer import Tokenizer
from cucafera.training.checkpoint_files import (
    UNFINISHED,
    CheckpointFolder,
    DamagedCheckpointError,
    best_of,
    read_checkpoint,
)
from cucafera.training.events import EVENTS
from cucafera.training.hardware import Hardware

log = logging.getLogger(__name__)

MAY_CHANGE = (
    "name", "run_dir", "resume", "resume_despite", "max_time",
    "budget_tokens", "epochs", "trainer", "callbacks", "logger",
)  # fmt: skip
"""Keys that a run may be continued with other values of: hardware, budget, and what happens beside training."""
MAY_CHANGE_WITHIN = ("data.prepared_dir", "data.processes", "data.validation_windows", "tokenizer.path")
"""More of them; the tokenizer itself may not change, wherever its file is."""
FIXED = ("model", "adapter", "batch_tokens", "sequence_length", "data.kind")
"""Keys that cannot be changed in the life of a run, whatever resume_despite says: step and weights would lose their
meaning."""

OUT_OF_MEMORY = "out of memory"
"""What the history calls it."""

PLUMBING = ("name", "run_dir", "resume", "resume_despite", "max_time", "logger", "data.prepared_dir", "data.processes")
"""Keys that say nothing about what comes out of a run."""


class ResumedCheckpoint(NamedTuple):
    """What a run goes on from.

    Attributes:
        path: Its file.
        state: Its content.
        damaged: What was wrong with later ones.
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

    def checkpoint_to_resume(self, config: Config, is_ours: bool) -> ResumedCheckpoint | None:
        """The newest checkpoint that is complete and undamaged; None for a run that begins here.

        Args:
            config: The run.
            is_ours: This process has trained here already, and goes back: what there is is not erased any more.

        Raises:
            UserError: the folder holds a run with another configuration, or only damaged checkpoints; or it holds
                none and resume=required.
        """
        marked = self.checkpoints.marked()
        if (config.resume == "overwrite" and not is_ours) or not marked:
            if config.resume == "required":
                raise UserError(f"resume=required, and {self.path} holds no checkpoint to go on from")
            if config.resume == "auto" and not is_ours and (foreign := self._not_ours_to_erase()):
                raise UserError(
                    f"{self.path} holds no checkpoint to go on from, but {', '.join(map(str, foreign))}. Choose "
                    "another name=..., or erase the run there with resume=overwrite"
                )
            for path in self.checkpoints.unmarked():
                log.warning("%s has no mark, so it was never finished: it becomes %s%s", path, path.name, UNFINISHED)
            return None
        damaged = []
        for path in reversed(marked):
            try:
                state = read_checkpoint(path)
            except DamagedCheckpointError as error:
                log.warning("%s; falling back to the checkpoint before it", error)
                damaged.append(str(error))
                continue
            self._refuse_another_run(config, state["config"])
            return ResumedCheckpoint(path, state, damaged)
        raise UserError(
            f"{self.path} holds checkpoints, and none of them can be used; resume=overwrite erases them and begins anew"
        )

    def _not_ours_to_erase(self) -> list[Path]:
        """What a run that failed before its first checkpoint cannot have left."""
        ours = (".ckpt", PARTIAL, UNFINISHED)
        found = [path for path in self.checkpoints.path.glob("*") if path.suffix not in ours]
        return found + [path for path in (self.metrics, self.report) if path.exists()]

    def _refuse_another_run(self, config: Config, before: dict[str, Any]) -> None:
        changes = changed_keys(config, before)
        fixed = {key: values for key, values in changes.items() if is_within(key, FIXED)}
        free = (*MAY_CHANGE, *MAY_CHANGE_WITHIN, *config.resume_despite)
        others = {key: values for key, values in changes.items() if key not in fixed and not is_within(key, free)}
        if not fixed and not others:
            return
        lines = [
            f"  - {key} is {shown(now)} here and {shown(then)} there"
            + ("; it cannot change in the life of a run" if key in fixed else "")
            for key, (then, now) in (others | fixed).items()
        ]
        if fixed:
            advice = f"Another run can begin with these weights: name=ANOTHER init_from={self.path}"
        else:
            accepted = [*config.resume_despite, *others]
            advice = f"To go on with the new values all the same: 'resume_despite=[{','.join(accepted)}]'"
        raise UserError(
            f"{self.path} holds a run with another configuration:\n"
            + "\n".join(lines)
            + f"\n{advice}. Or set the values back, choose another name=..., or erase that run with resume=overwrite."
        )

    def begin(self, config: Config, overrides: Sequence[str], resumed_step: int | None) -> None:
        """Writes what the run is; one that begins anew erases what an earlier one left.

        Args:
            config: The run.
            overrides: The command line.
            resumed_step: The step that it goes on from; None if it begins anew.

        Raises:
            UserError: the folder cannot be written.
        """
        with self._writing():
            if resumed_step is None:
                self._erase(checkpoints=config.resume == "overwrite")
            else:
                self.checkpoints.remove_after(resumed_step)
            self.checkpoints.path.mkdir(parents=True, exist_ok=True)
            write_text(self.config, OmegaConf.to_yaml(OmegaConf.structured(config)))
            write_text(self.overrides, OmegaConf.to_yaml(OmegaConf.create(list(overrides))))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Tells in a sentence that the folder cannot be written."""
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def note(self, what: str, **facts: Any) -> None:
        """Adds a line to the history of the run."""
        line = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "what": what, **facts}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            torn = self.history.exists() and not self.history.read_bytes().endswith(b"\n")  # by a power cut
            append(self.history, (b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
        except OSError as error:
            log.warning("%s cannot be written: %s", self.history, error.strerror or error)

    def note_out_of_memory(self, config: Config, hardware: Hardware) -> None:
        """Adds to the history that a device had too little memory for this model, trained so."""
        self.note(OUT_OF_MEMORY, **_taking_memory(config, hardware))

    def ran_out_of_memory(self, config: Config, hardware: Hardware) -> bool:
        """Whether the history says so."""
        if not self.history.exists():
            return False
        needed = {"what": OUT_OF_MEMORY, **_taking_memory(config, hardware)}
        for line in self.history.read_bytes().splitlines():
            with suppress(ValueError):  # torn by a power cut
                if needed.items() <= json.loads(line).items():
                    return True
        return False

    def note_start(
        self, config: Config, overrides: Sequence[str], hardware: dict[str, Any], resumed: ResumedCheckpoint | None
    ) -> None:
        """Adds the beginning of a session to the history: on what, and what has changed since the last one."""
        facts: dict[str, Any] = {"step": resumed.state["steps_done"] if resumed else 0}
        if resumed:
            changes = changed_keys(config, resumed.state["config"])
            facts["changed"] = {key: list(values) for key, values in changes.items()}
            facts["damaged"] = resumed.damaged
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        self.note(
            "went on" if resumed else "began",
            **facts,
            overrides=list(overrides),
            host=socket.gethostname(),
            hardware=hardware,
            versions=versions,
        )

    def read_metrics(self) -> dict[str, Any] | None:
        """What metrics.json holds; None if there is none, or none that can be read."""
        try:
            metrics: dict[str, Any] = json.loads(self.metrics.read_bytes())
        except (OSError, ValueError):
            return None
        return metrics if isinstance(metrics, dict) and "steps" in metrics else None

    def write_tokenizer(self, tokenizer: Tokenizer, stop_id: int) -> None:
        """Writes the tokenizer, and beside it what transformers needs to load it, with the chat template.

        Args:
            tokenizer: The tokenizer.
            stop_id: The token that ends what the model writes.

        Raises:
            UserError: they cannot be written.
        """
        with self._writing():
            tokenizer.save(self.tokenizer)
            write_text(self.tokenizer_config, json.dumps(tokenizer_description(stop_id), indent=2) + "\n")

    def _erase(self, checkpoints: bool) -> None:
        """Removes what an earlier run left; if not checkpoints, there are none but unfinished ones."""
        for path in (self.metrics, self.report, self.evaluation, *self.path.glob(EVENTS + "*")):
            path.unlink(missing_ok=True)
        if checkpoints:
            self.checkpoints.remove_all()
        else:
            self.checkpoints.set_aside_unmarked()


def checkpoint_of(source: str, key: str) -> Path:
    """The checkpoint that a path names: a file, or the best of a run folder, or else its newest.

    Args:
        source: The path.
        key: What the user gave it as, for messages.

    Raises:
        UserError: nothing is there.
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
    """The checkpoint that a path names, and its content; see `checkpoint_of`.

    Raises:
        UserError: nothing is there, or it cannot be read; with the others that there are.
    """
    path = checkpoint_of(source, key)
    try:
        return path, read_checkpoint(path, mapped=True)
    except DamagedCheckpointError as error:
        others = [str(other.path) for other in CheckpointFolder(path.parent).complete() if other.path != path]
        advice = f". There is also {' and '.join(others)}: name it instead of the folder" if others else ""
        raise UserError(f"{error}{advice}") from error


def tokenizer_beside(source: Path) -> Path:
    """Where the tokenizer of a run folder, or of a checkpoint in one, lies."""
    return RunFolder(source.parent.parent if source.is_file() else source).tokenizer


def _taking_memory(config: Config, hardware: Hardware) -> dict[str, Any]:
    """All that the memory of a step depends on."""
    return {
        "hardware": dataclasses.asdict(hardware),
        "strategy": config.trainer.strategy,
        "model": dataclasses.asdict(config.model),
        "adapter": dataclasses.asdict(config.adapter),
        "sequence_length": config.sequence_length,
    }


def changed_keys(config: Config, before: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each dotted key that differs, with its value before and now; a source that only one side has is one of them."""
    now = dataclasses.asdict(config)
    sources = {name: side["data"]["sources"] for name, side in (("before", before), ("now", now))}
    changes: dict[str, tuple[Any, Any]] = {
        f"data.sources.{name}": ("not given", "given") if name in sources["now"] else ("given", "not given")
        for name in sorted(set(sources["before"]) ^ set(sources["now"]))
    }
    flat_before = dict(flat(before))
    for key, value in flat(now):
        if key in flat_before and flat_before[key] != value:
            changes[key] = (flat_before[key], value)
    return changes


def is_within(key: str, accepted: Sequence[str]) -> bool:
    """Whether a dotted key is one of some keys, or lies below one."""
    return any(key == other or key.startswith(other + ".") for other in accepted)


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of nested dictionaries with its dotted key."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
