"""Lightning's checkpoint IO: copies the training state, and writes the copy in a background thread."""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from cucafera.runs.checkpoints import CheckpointError, CheckpointFolder, Score
from cucafera.runs.folder import StartingPoint

log = logging.getLogger(__name__)

MEMORY_LEFT_FREE = 0.1
"""Share of the free memory that a copy of the state must leave free."""


class CheckpointWriter(CheckpointIO):
    """Writes checkpoints while training continues: copies the state, and writes the copy in a thread.

    If the memory has no room for a copy, or the system no thread, training waits for the disk. A save that fails,
    because the disk is full or gone or memory has run out, is logged as an error and leaves the earlier checkpoints as
    they are; the next save is tried as usual.

    Args:
        folder: The folder to write to.
        start: The checkpoint that the run resumes from or begins with, which was read and verified before.
        keep_last: See `CheckpointFolder.remove_old`.
        keep_every_steps: See `CheckpointFolder.remove_old`.
        free_memory: Returns how many bytes of main memory are free.

    Attributes:
        first_step: Steps done at the start.
        saved_step: Step of the last complete checkpoint of the run; None if there is none.
        failure: The error of the last save; None if it succeeded.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        start: StartingPoint | None,
        keep_last: int,
        keep_every_steps: int,
        free_memory: Callable[[], int],
    ) -> None:
        self.folder = folder
        self.starting_state = start.state if start else None
        self.keep_last = keep_last
        self.keep_every_steps = keep_every_steps
        self.free_memory = free_memory
        self.first_step: int = start.state["steps_done"] if start else 0
        self.saved_step = self.first_step if start and start.is_own else None
        self.failure: Exception | None = None
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._unexpected: BaseException | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        """Start to write a state.

        Args:
            checkpoint: The state.
            path: Ignored: `CheckpointFolder` names the file by the step in the state, so the two cannot disagree.
            storage_options: The fields of the `Score` of this step, or None. Lightning passes these options through to
                the checkpoint IO untouched: it is its only way for a caller to hand something on with a state.
        """
        self.finish()
        score = None if storage_options is None else Score(**storage_options)
        if not self._is_written_in_thread(checkpoint, score):
            self._copies.clear()
            self._write(checkpoint, score)
            self.finish()

    def _is_written_in_thread(self, checkpoint: dict[str, Any], score: Score | None) -> bool:
        """Start to write a copy; return False if there is no memory for it, or no thread."""
        if not self._has_room_for_copy(checkpoint):
            return False
        try:
            copy = _copied(checkpoint, self._copies)
            thread = threading.Thread(target=self._write, args=(copy, score), name="checkpoint")
            thread.start()
        except (MemoryError, RuntimeError) as error:  # of torch and threading: no memory, no thread
            log.warning("Training waits for the checkpoint to be written: %s", str(error) or "no memory for a copy")
            return False
        self._thread = thread
        return True

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return the state that the run starts with; the arguments are ignored, since it has been read before."""
        assert self.starting_state is not None
        state, self.starting_state = self.starting_state, None  # or the memory would hold it twice
        return state

    def remove_checkpoint(self, path: Any) -> None:
        """Never called: only Lightning's ModelCheckpoint would, and `CheckpointFolder` removes files instead."""
        raise NotImplementedError

    def finish(self) -> None:
        """Wait until the save in progress is on disk, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        unexpected, self._unexpected = self._unexpected, None
        if unexpected is not None:
            raise unexpected

    def _write(self, state: dict[str, Any], score: Score | None) -> None:
        step = state["steps_done"]
        try:
            self.folder.write(step, state, score)
            self.saved_step, self.failure = step, None
        except (OSError, MemoryError, RuntimeError) as error:  # torch reports a lack of memory as the last one
            self.failure = error
            last = (
                f"the last checkpoint is of step {self.saved_step:,}"
                if self.saved_step is not None
                else "there is none"
            )
            log.error(
                "THE CHECKPOINT OF STEP %s COULD NOT BE WRITTEN to %s: %s. Training continues, and the next checkpoint "
                "is tried as usual; until then, %s.%s",
                f"{step:,}", self.folder.path, reason_of(error), last,
                " Free some space on that disk." if isinstance(error, OSError) else "",
            )  # fmt: skip
            return
        except BaseException as error:  # `finish` raises it in the thread that trains
            self._unexpected = error
            return
        try:
            self.folder.remove_old(step, self.keep_last, self.keep_every_steps)
        except (OSError, CheckpointError) as error:
            reason = getattr(error, "strerror", None) or error
            log.warning("Old checkpoints in %s cannot be removed: %s", self.folder.path, reason)

    def _has_room_for_copy(self, state: dict[str, Any]) -> bool:
        needed = sum(tensor.nbytes for tensor in _tensors(state)) - sum(copy.nbytes for copy in self._copies.values())
        return needed <= (1 - MEMORY_LEFT_FREE) * self.free_memory()


def reason_of(error: Exception) -> str:
    """Return why a save failed, in words."""
    if isinstance(error, MemoryError):
        return "memory has run out"
    return getattr(error, "strerror", None) or str(error)


def _tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        state = list(state.values())
    return [tensor for value in state for tensor in _tensors(value)] if isinstance(state, list | tuple) else []


def _copied(state: Any, copies: dict[str, Tensor], path: str = "") -> Any:
    """Return the state with every container and tensor copied, tensors into main memory.

    Args:
        state: Nested dictionaries, lists and tuples of tensors and plain values.
        copies: Tensors of an earlier copy by their paths; they are overwritten, which is many times as fast as
            allocating new memory, whose pages the system has to clear first.
        path: Path of `state` within the complete state.
    """
    if isinstance(state, Tensor):
        copy = copies.get(path)
        if copy is None or copy.shape != state.shape or copy.dtype != state.dtype:
            copy = copies[path] = torch.empty(state.shape, dtype=state.dtype)
        return copy.copy_(state)
    if isinstance(state, dict):
        return {key: _copied(value, copies, f"{path}/{key}") for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copied(value, copies, f"{path}/{index}") for index, value in enumerate(state))
    return state
