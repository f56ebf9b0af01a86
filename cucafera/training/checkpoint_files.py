"""Checkpoints on the disk: complete or ignored, verified before use, written beside training.

A checkpoint is two files. step-00000500.ckpt holds tensors and plain data, as torch.save writes them;
step-00000500.json, its mark, is written last and removed first, and holds size and SHA-256 of the other. Without its
mark a checkpoint is one that was never finished, and is ignored.
"""

import contextlib
import dataclasses
import hashlib
import logging
import math
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from cucafera.config import UserError
from cucafera.data.files import (
    PARTIAL,
    NotAsWrittenError,
    file_sha256,
    flush_folder,
    read_sealed,
    write_sealed,
    written_whole,
)

log = logging.getLogger(__name__)

VERSION = 1
UNFINISHED = ".unfinished"
"""Ends the name of a checkpoint's file that was found without its mark, and without any other checkpoint."""
STEP_FILE = re.compile(r"step-\d+\.ckpt")
SHOWN_BYTES = 1 << 30
"""Reading a larger checkpoint takes so long that it is announced."""
MEMORY_LEFT_FREE = 0.1
"""Share of the free memory that a copy of the state must leave."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is not there, not complete, or not what was written: it can be given up."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The mark of a complete checkpoint.

    Attributes:
        path: The file with the state.
        step: Steps done.
        size: Bytes of the file.
        sha256: Of the file, in hexadecimal.
        validation_loss: In nats a token, if there was a validation after this step.
    """

    path: Path
    step: int
    size: int
    sha256: str
    validation_loss: float | None


class CheckpointFolder:
    """The folder checkpoints/ of a run.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def file_at(self, step: int) -> Path:
        """Where the state after a step lies."""
        return self.path / f"step-{step:08d}.ckpt"

    def marked(self) -> list[Path]:
        """The files that have a mark, oldest first; whether they are as they were written is not known."""
        return [mark.with_suffix(".ckpt") for mark in sorted(self.path.glob("step-*.json"))]

    def unmarked(self) -> list[Path]:
        """The files without a mark: a save or a removal that never came to its end."""
        return sorted(set(self.path.glob("step-*.ckpt")) - set(self.marked()))

    def complete(self) -> list[Checkpoint]:
        """The checkpoints there are, oldest first; one with a damaged mark is none."""
        found = []
        for path in self.marked():
            with contextlib.suppress(CheckpointError):
                found.append(read_mark(path))
        return [checkpoint for checkpoint in found if checkpoint.path.exists()]

    def newest_step(self) -> int:
        """The step of the newest complete checkpoint; 0 if there is none, for a run that would begin again."""
        return max((checkpoint.step for checkpoint in self.complete()), default=0)

    def best(self) -> Checkpoint | None:
        """See `best_of`."""
        return best_of(self.complete())

    def write(self, step: int, state: dict[str, Any], validation_loss: float | None) -> None:
        """Writes the state after a step, and marks it when all of it is on the disk. Raises OSError."""
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.file_at(step)
        self._remove([path])  # a damaged one of the same step, whose mark must not speak for this one
        with written_whole(path) as file:
            content = _HashedFile(file)
            try:
                torch.save(state, cast(BinaryIO, content))
            except RuntimeError as error:  # torch's writer does not tell what went wrong with the file
                raise content.error or error from None
        facts = {"step": step, "size": content.size, "sha256": content.hash.hexdigest()}
        write_sealed(_mark_of(path), {"version": VERSION, **facts, "validation_loss": validation_loss})

    def remove_old(self, step: int, keep_last: int, keep_every_steps: int) -> None:
        """Removes what needs not be kept once the checkpoint of a step is complete.

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
        """Removes what lies after the step that a run goes on from, and what was never finished."""
        later = [path for path in self.marked() if path > self.file_at(step)]
        self._remove([*later, *self.unmarked()])
        self._remove_named(PARTIAL)

    def remove_all(self) -> None:
        """Removes every checkpoint; files of other names stay."""
        self.remove_after(-1)
        self._remove_named(UNFINISHED)

    def set_aside_unmarked(self) -> None:
        """Gives what has no mark another name: it may be all that somebody has copied here of a run."""
        for path in self.unmarked():
            path.rename(path.with_name(path.name + UNFINISHED))
        self._remove_named(PARTIAL)

    def _remove_named(self, ending: str) -> None:
        for path in self.path.glob("step-*" + ending):
            path.unlink()

    def _remove(self, paths: Iterable[Path]) -> None:
        """Removes marks first, so that half a removal leaves nothing that looks complete."""
        removed = [path for path in paths if path.exists() or _mark_of(path).exists()]
        if not removed:
            return
        for path in removed:
            _mark_of(path).unlink(missing_ok=True)
        flush_folder(self.path)
        for path in removed:
            path.unlink(missing_ok=True)


def best_of(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest validation loss; of several, the first. None if none was validated."""
    losses = {checkpoint: checkpoint.validation_loss for checkpoint in checkpoints}
    finite = {checkpoint: loss for checkpoint, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return min(finite, key=finite.__getitem__, default=None)


class _HashedFile:
    """What torch.save writes into: counts and hashes on the way, and remembers what went wrong."""

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


def _mark_of(path: Path) -> Path:
    return path.with_suffix(".json")


def read_mark(path: Path) -> Checkpoint:
    """The mark of a checkpoint's file. Raises DamagedCheckpointError if it has none, or a damaged one."""
    mark = _mark_of(path)
    if path.exists() and path.suffix != ".ckpt":
        raise CheckpointError(f"{path} is not a checkpoint: those end with .ckpt")
    try:
        content = read_sealed(mark)
        if content["version"] != VERSION:
            raise NotAsWrittenError(f"its format is {content['version']}, and this program reads {VERSION}")
        if STEP_FILE.fullmatch(path.name) and path.name != f"step-{content['step']:08d}.ckpt":
            raise NotAsWrittenError(f"it is the mark of step {content['step']}")
        return Checkpoint(path, content["step"], content["size"], content["sha256"], content["validation_loss"])
    except FileNotFoundError:
        reason = (
            f"there is no {mark.name} beside it, so it was never finished" if path.exists() else "it does not exist"
        )
    except OSError as error:
        raise _unreadable(mark, error.strerror or error) from error
    except NotAsWrittenError as error:
        reason = f"{mark.name} is damaged: {error}"
    except KeyError as error:
        reason = f"{mark.name} is not the mark of a checkpoint: it has no {error}"
    raise DamagedCheckpointError(f"{path} cannot be used: {reason}")


def _unreadable(path: Path, reason: object) -> CheckpointError:
    """What cannot be read now may be whole all the same: it is not given up for an earlier one."""
    return CheckpointError(f"{path} cannot be read: {reason}. Mend that, or remove the file to do without it")


def read_checkpoint(path: Path, mapped: bool = False) -> dict[str, Any]:
    """A complete checkpoint's tensors and plain data. Nothing in it is executed.

    Args:
        path: The file.
        mapped: Leave the tensors on the disk until they are looked at: less memory, but a process that holds them
            dies when the file is cut.

    Raises:
        DamagedCheckpointError: it is not there, not complete, or damaged.
        CheckpointError: it cannot be read now, for want of memory or a broken disk, or is not one of cucafera's.
    """
    mark = read_mark(path)
    try:
        size = path.stat().st_size
        if size != mark.size:
            raise DamagedCheckpointError(f"{path} is damaged: it has {size:,} bytes instead of {mark.size:,}")
        if size > SHOWN_BYTES:
            log.info("Verifying %s (%.1f GB)", path, size / 1e9)
        if file_sha256(path) != mark.sha256:
            raise DamagedCheckpointError(f"{path} is damaged: its content is not what was written")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path} cannot be read: there is no such file") from error
    except OSError as error:
        raise _unreadable(path, error.strerror or error) from error
    except CheckpointError:
        raise
    except Exception as error:  # torch.load raises many kinds, also for want of memory
        raise _unreadable(path, (str(error) or type(error).__name__).splitlines()[0]) from error
    missing = {"config", "identity", "state_dict", "steps_done"} - set(checkpoint)
    if missing:
        raise CheckpointError(f"{path} is not a checkpoint of cucafera: it has no {', '.join(sorted(missing))}")
    return dict(checkpoint)


class CheckpointWriter(CheckpointIO):
    """Lightning's way to the disk: copies the state, and writes the copy while training goes on.

    Where memory has no room for a copy, training waits for the disk. A save that fails, because the disk is full or
    gone, is told loudly and leaves the checkpoints before it as they are; the next one tries again.

    Args:
        folder: Where to.
        resumed: The state that the run goes on from: it was read and verified before.
        keep_last: See `CheckpointFolder.remove_old`.
        keep_every_steps: See there.
        free_memory: Tells how many bytes of memory are free.

    Attributes:
        saved_step: Step of the last checkpoint that is complete.
        failure: Why the last save failed, or None.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        resumed: dict[str, Any] | None,
        keep_last: int,
        keep_every_steps: int,
        free_memory: Callable[[], int],
    ) -> None:
        self.folder = folder
        self.resumed = resumed
        self.keep_last = keep_last
        self.keep_every_steps = keep_every_steps
        self.free_memory = free_memory
        self.saved_step: int | None = resumed["steps_done"] if resumed else None
        self.failure: OSError | None = None
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._unexpected: BaseException | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Begins to write a state.

        Args:
            checkpoint: The state.
            path: Not used: the step says where it goes.
            storage_options: The validation loss that belongs to it, or None.
        """
        self.finish()
        if self._has_room_for_copy(checkpoint):
            copy = _copied(checkpoint, self._copies)
            self._thread = threading.Thread(target=self._write, args=(copy, storage_options), name="checkpoint")
            self._thread.start()
        else:
            self._copies.clear()
            self._write(checkpoint, storage_options)
            self.finish()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """The state that the run goes on from."""
        assert self.resumed is not None
        state, self.resumed = self.resumed, None
        return state

    def remove_checkpoint(self, path: Any) -> None:
        """Lightning's interface wants it; only its ModelCheckpoint calls it, and here `CheckpointFolder` removes."""
        raise NotImplementedError

    def finish(self) -> None:
        """Waits until what was begun is on the disk, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        unexpected, self._unexpected = self._unexpected, None
        if unexpected is not None:
            raise unexpected

    def _write(self, state: dict[str, Any], validation_loss: float | None) -> None:
        step = state["steps_done"]
        try:
            self.folder.write(step, state, validation_loss)
            self.saved_step, self.failure = step, None
        except OSError as error:
            self.failure = error
            before = f"the last one is of step {self.saved_step:,}" if self.saved_step is not None else "there is none"
            log.error(
                "THE CHECKPOINT OF STEP %s COULD NOT BE WRITTEN to %s: %s. Training goes on, and the next checkpoint "
                "is tried as usual; until then %s. Make room on that disk.",
                f"{step:,}", self.folder.path, error.strerror or error, before,
            )  # fmt: skip
            return
        except BaseException as error:  # told where training can hear it
            self._unexpected = error
            return
        try:
            self.folder.remove_old(step, self.keep_last, self.keep_every_steps)
        except OSError as error:
            log.warning("Old checkpoints in %s cannot be removed: %s", self.folder.path, error.strerror or error)

    def _has_room_for_copy(self, state: dict[str, Any]) -> bool:
        needed = sum(tensor.nbytes for tensor in _tensors(state)) - sum(copy.nbytes for copy in self._copies.values())
        return needed <= (1 - MEMORY_LEFT_FREE) * self.free_memory()


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        state = list(state.values())
    return [tensor for value in state for tensor in _tensors(value)] if isinstance(state, list | tuple) else []


def _copied(state: Any, copies: dict[str, Tensor], place: str = "") -> Any:
    """The state with every container and tensor copied, tensors into main memory.

    Args:
        state: Nested dictionaries, lists and tuples of tensors and plain values.
        copies: Tensors of an earlier copy by their places: they are written over, which is many times as fast as
            new memory.
        place: Where `state` stands in the whole.
    """
    if isinstance(state, Tensor):
        before = copies.get(place)
        if before is None or before.shape != state.shape or before.dtype != state.dtype:
            before = copies[place] = torch.empty(state.shape, dtype=state.dtype)
        return before.copy_(state)
    if isinstance(state, dict):
        return {key: _copied(value, copies, f"{place}/{key}") for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copied(value, copies, f"{place}/{index}") for index, value in enumerate(state))
    return state
