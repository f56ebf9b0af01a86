"""Lightning's data module: serves the windows of a run, one optimizer step at a time."""

import logging
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Sampler

from cucafera.data.run_data import RunData
from cucafera.data.windows import Batch, TrainingSteps

log = logging.getLogger(__name__)

PREFETCHED_BATCHES = 2
"""Batches that a worker process reads ahead: two workers then hold 38 MB of the default 524,288 tokens, and a container
has 64 MB of shared memory by default."""
SHARED_MEMORY = Path("/dev/shm")
"""Where workers put their batches on Linux; a worker that finds no room there dies, and the run with it."""


class RemainingSteps(Sampler[int]):
    """The steps of a run from `first` on."""

    def __init__(self, first: int, total: int) -> None:
        self.steps = range(first, total)

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)


class WindowDataModule(pl.LightningDataModule):
    """Serves this device's windows of each remaining step.

    Args:
        data: The data of the run, open.
        first_step: The step that training starts or resumes with.
        num_workers: Processes that read windows; 0: the training process, which also reads where shared memory is too
            small for the batches of that many.
        pin_memory: Put batches into page-locked memory, which a GPU copies from asynchronously.
        skipped_batches: Numbers of batches that rollbacks skip.
    """

    training_steps: TrainingSteps

    def __init__(
        self,
        data: RunData[Any],
        first_step: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        skipped_batches: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.data = data
        self.first_step = first_step
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.skipped_batches = skipped_batches

    def setup(self, stage: str | None = None) -> None:
        """Take this device's share of each step."""
        self.training_steps = self.data.training_steps(self.skipped_batches, *self._rank_and_world_size())

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the remaining steps, each a Batch of this device's windows."""
        workers = self._workers_that_fit()
        return DataLoader(
            self.training_steps,
            sampler=RemainingSteps(self.first_step, self.data.config.total_steps),
            batch_size=None,
            generator=torch.Generator(),  # or the loader would draw from the one whose state checkpoints keep
            collate_fn=_unchanged,
            num_workers=workers,
            pin_memory=self.pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=_ignore_signals,
            prefetch_factor=PREFETCHED_BATCHES if workers else None,
        )

    def val_dataloader(self) -> Iterator[Batch]:
        """Yield this device's share of the held-out windows."""
        yield from self.data.validation_batches(*self._rank_and_world_size())

    def _workers_that_fit(self) -> int:
        """The worker processes; none if shared memory is too small for what those of this machine hold at once."""
        if not self.num_workers:
            return 0
        devices = 1 if self.trainer is None else self.trainer.num_devices
        # A worker holds the batches that it reads ahead, and the one that training has taken.
        needed = devices * self.num_workers * (PREFETCHED_BATCHES + 1) * self.training_steps.batch_bytes
        free = free_shared_memory(SHARED_MEMORY)
        if free is None or needed <= free:
            return self.num_workers
        if self._rank_and_world_size()[0] == 0:
            log.warning(
                "%s has %.0f MB free, and the batches of %d data loader workers need %.0f MB: the training process "
                "reads its data itself. A container gets more with --shm-size=1g; trainer.num_workers=0 ends this "
                "warning.",
                SHARED_MEMORY, free / 1e6, devices * self.num_workers, needed / 1e6,
            )  # fmt: skip
        return 0

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


def free_shared_memory(folder: Path) -> int | None:
    """Return the free bytes of the folder of shared memory; None where there is no such folder, and no such limit."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _unchanged(batch: Any) -> Any:
    """Collate nothing: the default would turn the tuple of counts into a list."""
    return batch


def _ignore_signals(worker: int) -> None:
    """Ignore signals, which may be sent to every process of a job: a reader must live until the step is saved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
