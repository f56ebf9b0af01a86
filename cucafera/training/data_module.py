"""Lightning's data module: serves the windows of a run, one optimizer step at a time."""

import contextlib
import io
import logging
import multiprocessing
import multiprocessing.util
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, cast

import lightning.pytorch as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection

from cucafera.data.run_data import RunData
from cucafera.data.windows import Batch, TrainingSteps

log = logging.getLogger(__name__)

SIGNALS_OF_A_JOB = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What a user, a scheduler or a sweep sends: the training process handles them, and workers ignore them."""
CONTEXT: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
"""How workers are started: a fork has the open data at once; on macOS, its libraries forbid it."""


class WindowDataModule(pl.LightningDataModule):
    """Serves this device's windows of each remaining step.

    Args:
        data: The data of the run, open.
        first_step: The step that training starts or resumes with.
        num_workers: Processes that read windows; 0: the training process.
        pin_memory: Put batches into page-locked memory, which a GPU copies from asynchronously.
        skipped_batches: Numbers of batches that rollbacks skip.
        worker_lost: See `StepLoader`.
    """

    training_steps: TrainingSteps

    def __init__(
        self,
        data: RunData[Any],
        first_step: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        skipped_batches: Sequence[int] = (),
        worker_lost: Callable[[str], None] = log.warning,
    ) -> None:
        super().__init__()
        self.data = data
        self.first_step = first_step
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.skipped_batches = skipped_batches
        self.worker_lost = worker_lost

    def setup(self, stage: str | None = None) -> None:
        """Take this device's share of each step."""
        self.training_steps = self.data.training_steps(self.skipped_batches, *self._rank_and_world_size())

    def train_dataloader(self) -> "StepLoader":
        """Return the remaining steps, each a Batch of this device's windows."""
        remaining = range(self.first_step, self.data.config.total_steps)
        return StepLoader(self.training_steps, remaining, self.num_workers, self.pin_memory, self.worker_lost)

    def val_dataloader(self) -> Iterator[Batch]:
        """Yield this device's share of the held-out windows."""
        yield from self.data.validation_batches(*self._rank_and_world_size())

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


def data_of(trainer: pl.Trainer) -> RunData[Any]:
    """Return the data that a trainer fits with; Lightning's types do not know of it."""
    return data_module_of(trainer).data


def data_module_of(trainer: pl.Trainer) -> WindowDataModule:
    """Return the data module that a trainer fits with; Lightning's types do not know of it."""
    return cast(WindowDataModule, trainer.datamodule)  # type: ignore[attr-defined]


class _Worker(NamedTuple):
    """A process that reads every n-th step ahead, and the pipe that its batches come through."""

    process: BaseProcess
    batches: Connection


class StepLoader:
    """The batches of the remaining steps, read ahead by worker processes.

    Worker w of n reads the steps w, w + n, w + 2n, ...: nothing need be sent to a worker, and each has a pipe of its
    own. No lock, queue or memory is shared, so a worker that is killed cannot block another process, and its pipe shows
    at once that it is dead. A worker reads ahead until its pipe is full: one batch, or some small ones.

    What a worker does not deliver, the training process reads itself.

    Args:
        steps: The batch of each step.
        remaining: The steps to read.
        num_workers: Processes; 0: the training process reads.
        pin_memory: Put batches into page-locked memory.
        worker_lost: Called with the reason if a worker dies; from then on, the training process reads.
    """

    def __init__(
        self,
        steps: TrainingSteps,
        remaining: range,
        num_workers: int,
        pin_memory: bool,
        worker_lost: Callable[[str], None],
    ) -> None:
        self.steps = steps
        self.remaining = remaining
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.worker_lost = worker_lost
        self._workers: list[_Worker] = []
        self._at_exit: multiprocessing.util.Finalize

    def __len__(self) -> int:
        return len(self.remaining)

    def __iter__(self) -> Iterator[Batch]:
        self._start()
        try:
            for index, step in enumerate(self.remaining):
                batch = self._from_worker(index) or self.steps[step]
                yield apply_to_collection(batch, torch.Tensor, torch.Tensor.pin_memory) if self.pin_memory else batch
        finally:
            self._stop()

    def _start(self) -> None:
        """Start the workers; where the system has no process for them, the training process reads."""
        # At exit, multiprocessing would send SIGTERM, which workers ignore, and wait for them.
        self._at_exit = multiprocessing.util.Finalize(None, self._stop, exitpriority=0)
        # A worker inherits the mask: it must not die from a signal that comes before it ignores them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_OF_A_JOB)
        try:
            for number in range(self.num_workers):
                receiver, sender = multiprocessing.Pipe(duplex=False)
                inherited = [receiver, *(worker.batches for worker in self._workers)]
                steps = self.remaining[number :: self.num_workers]
                process = CONTEXT.Process(
                    target=_serve, args=(self.steps, steps, sender, inherited), name="data loader worker", daemon=True
                )
                process.start()
                sender.close()  # now only the worker has it: its death ends the pipe
                self._workers.append(_Worker(process, receiver))
        except (OSError, MemoryError) as error:
            self._stop()
            log.warning(
                "trainer.num_workers=%d: a process cannot be started: %s. The training process reads its data itself.",
                self.num_workers, error,
            )  # fmt: skip
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _from_worker(self, index: int) -> Batch | None:
        """Return the batch of a step by its number among the remaining ones; None if no worker delivers it."""
        if not self._workers:
            return None
        content = None
        with contextlib.suppress(EOFError, OSError):
            content = self._workers[index % self.num_workers].batches.recv_bytes()
        # One that has read all of its steps exits with 0.
        dead = [worker.process for worker in self._workers if worker.process.exitcode]
        if content is None and not dead:  # its pipe ended before the process did
            self._workers[index % self.num_workers].process.join(1)
            dead = [self._workers[index % self.num_workers].process]
        if dead:
            self._stop()
            self.worker_lost(f"the death of data loader worker {dead[0].pid} ({_end_of(dead[0])})")
        return cast(Batch, pickle.loads(content)) if content else None

    def _stop(self) -> None:
        """Kill the workers; they hold nothing."""
        self._at_exit.cancel()
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.batches.close()
        self._workers.clear()


def _end_of(process: BaseProcess) -> str:
    """Return how a process has ended, in words."""
    code = process.exitcode
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"{name}; memory may have run out" if name == "SIGKILL" else name


def _serve(steps: TrainingSteps, numbers: range, sender: Connection, inherited: Sequence[Connection]) -> None:
    """Send the batches of steps, in a worker process.

    Signals may be sent to every process of a job; a worker must live until the step is saved. It ends when the training
    process does, since its pipe has no reader then: a worker must not keep the other end open.
    """
    for number in SIGNALS_OF_A_JOB:
        signal.signal(number, signal.SIG_IGN)
    for receiver in inherited:
        receiver.close()
    torch.set_num_threads(1)
    with contextlib.suppress(OSError):  # the training process has ended
        for step in numbers:
            try:
                content = _packed(steps[step])
            except Exception:  # the training process reads this step itself, and reports the error
                content = b""
            sender.send_bytes(content)


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays; by themselves they would be pickled by torch.save, or into shared memory."""

    def reducer_override(self, value: Any) -> Any:
        """Return how to restore a tensor."""
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def _packed(batch: Batch) -> bytes:
    content = io.BytesIO()
    _Pickler(content, protocol=5).dump(batch)
    return content.getvalue()
