"""Checkpoint files: atomic writes, a marker for each complete one, checksums that are verified before use.

A checkpoint is two files. step-00000500.ckpt holds tensors and plain data, written by torch.save; step-00000500.json,
its marker, holds the size and the SHA-256 of the other. The marker is written last and removed first, so a checkpoint
without a marker was never completed, and is ignored.

torch is imported only where tensors are read or written: markers can be read without it.
"""

import contextlib
import dataclasses
import hashlib
import logging
import math
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from cucafera.config.errors import UserError
from cucafera.quantities import data_size, number_of
from cucafera.runs.shape import NUMBER, shape_problem
from cucafera.storage import (
    PARTIAL,
    ChecksumError,
    atomic_write,
    file_sha256,
    fsync_folder,
    list_folder,
    read_json_with_checksum,
    write_json_with_checksum,
)

log = logging.getLogger(__name__)

VERSION = 2
UNFINISHED = ".unfinished"
"""Suffix added to a checkpoint file that has no marker when a new run starts in its folder."""
STEP_FILE = re.compile(r"step-\d+\.ckpt")
MARKER = {"step": int, "size": int, "sha256": str}
SCORE = {"metric": str, "value": NUMBER, "direction": str}
"""Shapes of a marker, and of the score in it."""
CONTENT: dict[str, Any] = {"config": {}, "fingerprints": {str: str}, "state_dict": {}, "steps_done": int}
"""Shape of what a checkpoint must hold."""
ANNOUNCED_BYTES = 1 << 30
"""Verifying a checkpoint larger than this takes seconds, so it is logged."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is missing, incomplete or damaged: an earlier one may be used as a fallback."""


class Score(NamedTuple):
    """The result of the validation after the step of a checkpoint.

    Attributes:
        metric: Its name.
        value: Its value.
        direction: lower or higher: which is better.
    """

    metric: str
    value: float
    direction: str


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, as its marker describes it.

    Attributes:
        path: The file with the training state.
        step: Steps done.
        size: Bytes of the file.
        sha256: SHA-256 of the file, in hexadecimal.
        score: The primary metric; None if there was no validation after this step.
    """

    path: Path
    step: int
    size: int
    sha256: str
    score: Score | None


class CheckpointFolder:
    """The folder checkpoints/ of a run.

    Args:
        path: The folder; it need not exist.

    Attributes:
        on_save: Called with the step after each checkpoint that is complete.

    Methods that look into the folder raise CheckpointError if it cannot be read: it may hold checkpoints.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.on_save: Callable[[int], None] = lambda step: None

    def entries(self) -> list[Path]:
        """Return the paths in the folder, sorted; none if there is no folder."""
        try:
            return list_folder(self.path)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be read: {error.strerror or error}. Fix that, for example by mounting its disk, "
                "since it may hold checkpoints"
            ) from error

    def _named(self, ending: str) -> list[Path]:
        return [path for path in self.entries() if path.name.startswith("step-") and path.name.endswith(ending)]

    def file_at(self, step: int) -> Path:
        """Return the path of the checkpoint of a step."""
        return self.path / f"step-{step:08d}.ckpt"

    def marked(self) -> list[Path]:
        """Return the checkpoint files that have a marker, oldest first, without verifying them."""
        return [marker.with_suffix(".ckpt") for marker in self._named(".json")]

    def unmarked(self) -> list[Path]:
        """Return the checkpoint files without a marker: saves or removals that were interrupted."""
        return sorted(set(self._named(".ckpt")) - set(self.marked()))

    def complete(self) -> list[Checkpoint]:
        """Return the checkpoints with an intact marker, oldest first; their content is not verified."""
        found = []
        for path in self.marked():
            with contextlib.suppress(DamagedCheckpointError):
                found.append(read_marker(path))
        return [checkpoint for checkpoint in found if checkpoint.path.exists()]

    def why_none(self) -> str:
        """Return the reason why no checkpoint is complete, as a clause."""
        if unmarked := self.unmarked():
            return (
                f"{unmarked[-1].name} has no marker {_marker_path(unmarked[-1]).name}: it was never completed, or its "
                "marker was deleted"
            )
        for path in reversed(self.marked()):
            try:
                read_marker(path)
            except CheckpointError as error:
                return str(error)
            return f"there is a marker {_marker_path(path).name}, but no {path.name}"
        return "its checkpoints/ is empty" if self.path.is_dir() else "it has no folder checkpoints/"

    def newest_step(self) -> int:
        """Return the step of the newest complete checkpoint; 0 if there is none."""
        return max((checkpoint.step for checkpoint in self.complete()), default=0)

    def best(self) -> Checkpoint | None:
        """Return the best complete checkpoint; see `best_of`."""
        return best_of(self.complete())

    def write(self, step: int, state: dict[str, Any], score: Score | None) -> None:
        """Write the state after a step, then its marker once the state is on disk. Raises OSError."""
        import torch

        self.path.mkdir(parents=True, exist_ok=True)
        path = self.file_at(step)
        self._remove([path])  # a damaged checkpoint of the same step has a marker that does not describe the new file
        with atomic_write(path) as file:
            content = _HashedFile(file)
            try:
                torch.save(state, cast(BinaryIO, content))
            except RuntimeError as error:  # torch's writer hides the OSError of the file that it writes to
                raise content.error or error from None
        facts = {"step": step, "size": content.size, "sha256": content.hash.hexdigest()}
        marker = {"version": VERSION, **facts, "score": score and score._asdict()}
        write_json_with_checksum(_marker_path(path), marker)
        self.on_save(step)

    def remove_old(self, step: int, keep_last: int, keep_every_steps: int) -> None:
        """Remove the checkpoints that need not be kept once that of a step is complete.

        Kept are the last few up to that step, the best, and those whose step is a multiple of `keep_every_steps`
        (0: none).
        """
        complete = self.complete()
        up_to, best = [checkpoint for checkpoint in complete if checkpoint.step <= step], best_of(complete)
        self._remove(
            checkpoint.path
            for checkpoint in up_to[:-keep_last]
            if checkpoint != best and not (keep_every_steps and checkpoint.step % keep_every_steps == 0)
        )

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints after the step that a run resumes from, and the incomplete ones."""
        later = [path for path in self.marked() if path > self.file_at(step)]
        self._remove([*later, *self.unmarked()])
        self._remove_named(PARTIAL)

    def remove_all(self) -> None:
        """Remove every checkpoint; files of other names stay."""
        self.remove_after(-1)
        self._remove_named(UNFINISHED)

    def set_aside_unmarked(self) -> None:
        """Rename checkpoint files without a marker: one may be all that the user has copied here of a run."""
        for path in self.unmarked():
            path.rename(path.with_name(path.name + UNFINISHED))
        self._remove_named(PARTIAL)

    def _remove_named(self, ending: str) -> None:
        for path in self._named(ending):
            path.unlink()

    def _remove(self, paths: Iterable[Path]) -> None:
        """Remove markers first, so that an interrupted removal leaves nothing that looks complete."""
        removed = [path for path in paths if path.exists() or _marker_path(path).exists()]
        if not removed:
            return
        for path in removed:
            _marker_path(path).unlink(missing_ok=True)
        fsync_folder(self.path)
        for path in removed:
            path.unlink(missing_ok=True)


def best_of(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """Return the checkpoint with the best finite score, the earliest of equal ones; None if no score is finite."""
    scored = [(checkpoint.score, checkpoint) for checkpoint in checkpoints if checkpoint.score is not None]
    finite = [
        (score.value if score.direction == "lower" else -score.value, checkpoint.step, checkpoint)
        for score, checkpoint in scored
        if math.isfinite(score.value)
    ]
    return min(finite, key=lambda ranked: ranked[:2])[-1] if finite else None


class _HashedFile:
    """The file object that torch.save writes to: counts and hashes the bytes, and keeps the error of a failed write."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        self.hash.update(content)
        try:
            written = self.file.write(content)
        except OSError as error:
            self.error = error
            raise
        self.size += written
        return written

    def flush(self) -> None:
        self.file.flush()


def _marker_path(path: Path) -> Path:
    return path.with_suffix(".json")


def read_marker(path: Path) -> Checkpoint:
    """Return what the marker of a checkpoint file says. Raises DamagedCheckpointError if it is missing or damaged."""
    marker = _marker_path(path)
    try:
        if path.suffix != ".ckpt" and path.exists():
            raise CheckpointError(f"{path} is not a checkpoint: the name of a checkpoint ends with .ckpt")
        content = read_json_with_checksum(marker)
        if content.get("version") != VERSION:
            raise ChecksumError(f"its format is {content.get('version')}, and this version of cucafera reads {VERSION}")
        problem = shape_problem(content, MARKER) or (content.get("score") and shape_problem(content["score"], SCORE))
        if problem:
            raise ChecksumError(f"it is not the marker of a checkpoint: {problem}")
        if STEP_FILE.fullmatch(path.name) and path.name != f"step-{content['step']:08d}.ckpt":
            raise ChecksumError(f"it is the marker of step {content['step']}")
        score = Score(*(content["score"][field] for field in Score._fields)) if content.get("score") else None
        return Checkpoint(path, content["step"], content["size"], content["sha256"], score)
    except FileNotFoundError:
        reason = (
            f"its marker {marker.name} is missing, so it was never completed" if path.exists() else "it does not exist"
        )
    except OSError as error:
        raise _unreadable(marker, error.strerror or error) from error
    except ChecksumError as error:
        reason = f"{marker.name} is damaged: {error}"
    raise DamagedCheckpointError(f"{path} cannot be used: {reason}")


def _unreadable(path: Path, reason: object) -> CheckpointError:
    """Return the error of a file that may be intact: no earlier checkpoint replaces it as a fallback."""
    return CheckpointError(f"{path} cannot be read: {reason}. Fix that, or delete the file to do without it")


def verify(path: Path) -> None:
    """Compare a checkpoint file with its marker.

    Raises:
        DamagedCheckpointError: it is missing, incomplete or damaged.
        CheckpointError: it cannot be read now, or is not a checkpoint of cucafera.
    """
    marker = read_marker(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DamagedCheckpointError(f"{path} is damaged: it is not a regular file")
        size = status.st_size
        if size != marker.size:
            raise DamagedCheckpointError(
                f"{path} is damaged: it has {number_of(size, 'byte')} instead of {marker.size:,}"
            )
        if size > ANNOUNCED_BYTES:
            log.info("Verifying %s (%s)", path, data_size(size))
        if file_sha256(path) != marker.sha256:
            raise DamagedCheckpointError(f"{path} is damaged: checksum mismatch (SHA-256)")
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path} cannot be read: there is no such file") from error
    except OSError as error:
        raise _unreadable(path, error.strerror or error) from error


def read_checkpoint(path: Path, mapped: bool = False) -> dict[str, Any]:
    """Verify a complete checkpoint and return its tensors and plain data. No code in it is executed.

    Args:
        path: The file.
        mapped: Memory-map the tensors: less memory, but the process is killed if the file is truncated meanwhile.

    Raises:
        DamagedCheckpointError: it is missing, incomplete or damaged.
        CheckpointError: it cannot be read now (a disk error, too little memory), or is not a checkpoint of cucafera.
    """
    import torch

    verify(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load raises many kinds of errors, also when memory runs out
        raise _unreadable(path, (str(error) or type(error).__name__).splitlines()[0]) from error
    if problem := shape_problem(checkpoint, CONTENT):
        raise CheckpointError(f"{path} is not a checkpoint of cucafera: {problem}")
    return dict(checkpoint)
