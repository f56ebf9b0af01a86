"""From windows to the batches of a run: what pretraining and finetuning have in common.

n  windows of one device in one step
T  sequence_length
W  windows of one step over all devices
"""

import functools
import hashlib
import json
import logging
import math
import shutil
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cucafera.config import Config, SourceConfig, UserError
from cucafera.data.order import WindowOrder
from cucafera.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

IGNORED = -100
"""A target with this value is not trained on; the value is that of torch.nn.functional.cross_entropy."""
PREFETCHED_BATCHES = 2
"""Batches that a worker process reads ahead: two workers then hold 38 MB of the default 524,288 tokens, and a container
has 64 MB of shared memory by default."""
SHARED_MEMORY = Path("/dev/shm")
"""Where workers put their batches on Linux; one that finds no room there ends, and the run with it."""


class Window(NamedTuple):
    """One training example: three arrays [T] of int32.

    Attributes:
        input_ids: Token ids.
        targets: The next token of each, or IGNORED.
        documents: Number of the document or conversation that each token belongs to; within the window it goes up by
            one from each to the next.
    """

    input_ids: NDArray[np.int32]
    targets: NDArray[np.int32]
    documents: NDArray[np.int32]


class WindowSource(Protocol):
    """The windows of one source."""

    def __len__(self) -> int:
        """Windows in it."""
        ...

    def window(self, number: int) -> Window:
        """The window of this number."""
        ...


Source = TypeVar("Source", bound=WindowSource)


class Batch(NamedTuple):
    """Windows of one device.

    Attributes:
        input_ids: [n, T] int32.
        targets: [n, T] int32: the next token of each, or IGNORED.
        documents: [n, T] int32: number of the document that each token belongs to, within its window;
            None where tokens may attend to the whole window.
        document_counts: Number of documents in each of the n windows, known without asking the device; None where
            documents is None.
    """

    input_ids: Tensor
    targets: Tensor
    documents: Tensor | None
    document_counts: tuple[int, ...] | None

    def split(self, windows: int) -> Iterator["Batch"]:
        """Batches of at most so many windows."""
        for first in range(0, len(self.input_ids), windows):
            part = slice(first, first + windows)
            yield Batch(
                self.input_ids[part],
                self.targets[part],
                None if self.documents is None else self.documents[part],
                None if self.document_counts is None else self.document_counts[part],
            )

    def padded(self, windows: int) -> "Batch":
        """So many windows; those that are added have no targets, and are one document each."""
        added = windows - len(self.input_ids)
        missing = (0, 0, 0, added)
        return Batch(
            F.pad(self.input_ids, missing),
            F.pad(self.targets, missing, value=IGNORED),
            None if self.documents is None else F.pad(self.documents, missing),
            None if self.document_counts is None else self.document_counts + (1,) * added,
        )


def batch_of_windows(windows: Sequence[Window], document_masking: bool) -> Batch:
    """The windows of a device, side by side."""
    input_ids, targets, documents = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*windows, strict=True))
    if not document_masking:
        return Batch(input_ids, targets, None, None)
    counts = documents[:, -1] - documents[:, 0] + 1  # their numbers go up by one
    return Batch(input_ids, targets, documents, tuple(counts.tolist()))


class TrainingSteps(Dataset[Batch]):
    """Step s of the run: its share of the windows [s W, (s + 1) W), unless batches are left out.

    Args:
        sources: The training windows of each source.
        config: The run.
        left_out_batches: Numbers of batches that are left out.
        rank, world_size: Which share.
    """

    def __init__(
        self,
        sources: Sequence[WindowSource],
        config: Config,
        left_out_batches: Sequence[int],
        rank: int,
        world_size: int,
    ) -> None:
        self.sources = sources
        self.config = config
        self.left_out_batches = sorted(left_out_batches)
        self.rank = rank
        self.share = config.windows_per_step // world_size
        weights = [source.weight for source in config.data.sources.values()]
        self.order = WindowOrder([len(source) for source in sources], weights, config.seed)

    def batch_at(self, step: int) -> int:
        """The number of the batch that a step, the first being 0, trains on: b has the windows [b W, (b + 1) W)."""
        batch = step
        for left_out in self.left_out_batches:
            batch += left_out <= batch
        return batch

    @property
    def batch_bytes(self) -> int:
        """Bytes of one device's batch: int32 token ids and targets, and document numbers where they are masked."""
        arrays = 3 if self.config.data.document_masking else 2
        return 4 * arrays * self.share * self.config.sequence_length

    def __getitem__(self, step: int) -> Batch:
        batch = self.batch_at(step)
        if self.config.data.overfit_steps is not None:
            batch %= self.config.data.overfit_steps
        first = batch * self.config.windows_per_step + self.rank * self.share
        places = zip(*self.order.windows(first, self.share), strict=True)
        windows = [self.sources[source].window(int(number)) for source, number in places]
        return batch_of_windows(windows, self.config.data.document_masking)


class StepsLeft(Sampler[int]):
    """The steps of a run from one on."""

    def __init__(self, first: int, total: int) -> None:
        self.steps = range(first, total)

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)


class OpenedSource(NamedTuple, Generic[Source]):
    """The windows of one source.

    Attributes:
        training, validation: Windows to train on and held-out windows.
        identity: A hash of the training data.
    """

    training: Source
    validation: Source
    identity: str


class WindowDataModule(pl.LightningDataModule, ABC, Generic[Source]):
    """Prepares the sources of a run and serves their windows; subclasses say what a window is.

    Args:
        config: The run.
        first_step: The step that training begins or goes on with.
        num_workers: Processes that read windows; 0: the training process, which also reads where shared memory is too
            small for the batches of so many.
        pin_memory: Put batches into memory that a GPU can copy from at once.
        expected: What `identity` was when the weights were trained that training goes on or begins with, as far as
            it must be the same.
        left_out_batches: Numbers of batches that are left out.

    Attributes:
        training_sources, validation_sources: The windows of each source; known after `setup`.
        identity: Hashes of what the weights depend on, the tokenizer and the training data of each source; known
            after `setup`, and the same until the end, whatever becomes of the files meanwhile.
    """

    stop_id: int
    """The token that ends what the model writes after a prompt."""
    identity: dict[str, str]
    training_sources: list[Source]
    validation_sources: list[Source]
    training_steps: TrainingSteps

    def __init__(
        self,
        config: Config,
        first_step: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        expected: dict[str, str] | None = None,
        left_out_batches: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.config = config
        self.first_step = first_step
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.expected = expected or {}
        self.left_out_batches = left_out_batches
        self.prepared = Path(config.data.prepared_dir)
        self._is_prepared = False
        self._is_open = False

    @abstractmethod
    def prepare_source(self, name: str, source: SourceConfig) -> None:
        """Makes the tokens of a source, unless they are there."""

    @abstractmethod
    def open_source(self, name: str, source: SourceConfig) -> OpenedSource[Source]:
        """Opens what `prepare_source` made. Raises UserError if it gives no training window."""

    @abstractmethod
    def nothing_held_out(self) -> str:
        """The message that there is no window to validate on."""

    @abstractmethod
    def prompt_ids(self, prompt: str) -> list[int]:
        """What stands before a text that the model writes in answer to a prompt."""

    @abstractmethod
    def describe(self) -> str:
        """The amounts of data, for the terminal."""

    def prepare_data(self) -> None:
        """Makes what is not there yet. Lightning calls it again, in one process of the job, after the door did."""
        if self._is_prepared:
            return
        for name, source in self.config.data.sources.items():
            self.prepare_source(name, source)
        self._is_prepared = True

    def setup(self, stage: str | None = None) -> None:
        """Opens tokenizer and sources, the first time, and takes this device's share of each step.

        Raises:
            UserError: tokenizer or data are not those that the weights were trained with, the tokenizer does not fit
                the model, or there is too little data for one window.
        """
        if not self._is_open:
            self._open()
        self.training_steps = TrainingSteps(
            self.training_sources, self.config, self.left_out_batches, *self._rank_and_world_size()
        )

    def _open(self) -> None:
        opened = {name: self.open_source(name, source) for name, source in self.config.data.sources.items()}
        self.identity = {"tokenizer": self.tokenizer.fingerprint}
        self.identity |= {f"data.sources.{name}": source.identity for name, source in opened.items()}
        self._refuse_other_data()
        self.training_sources = [source.training for source in opened.values()]
        self.validation_sources = [source.validation for source in opened.values()]
        if not sum(map(len, self.validation_sources)):
            raise UserError(self.nothing_held_out())
        self._is_open = True

    def _refuse_other_data(self) -> None:
        changed = [name for name, value in self.expected.items() if self.identity.get(name) != value]
        if changed:
            values = "".join(
                f"\n  - {name} has the fingerprint {self.identity.get(name, 'none')[:16]} here and "
                f"{self.expected[name][:16]} there"
                for name in changed
            )
            raise UserError(
                f"{' and '.join(changed)} {'is' if len(changed) == 1 else 'are'} not what these weights were trained "
                f"with: their files have changed, or a tokenizer was trained on other text.{values}\n"
                "Bring them back, set tokenizer.path to the tokenizer.json of the run, begin a new run under another "
                f"name=..., or go on all the same: 'resume_despite=[{','.join(changed)}]'"
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        """The steps that are left, each a Batch of this device's windows."""
        workers = self._workers_that_fit()
        return DataLoader(
            self.training_steps,
            sampler=StepsLeft(self.first_step, self.config.total_steps),
            batch_size=None,
            generator=torch.Generator(),  # or the loader would draw from the one whose state checkpoints keep
            collate_fn=_unchanged,
            num_workers=workers,
            pin_memory=self.pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_signals_to_the_parent,
            prefetch_factor=PREFETCHED_BATCHES if workers else None,
        )

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

    def val_dataloader(self) -> Iterator[Batch]:
        """This device's share of the held-out windows, in batches as large as a training step's.

        Every device has as many, since all may have to take part in a forward pass: where one is missing, there is one
        without targets.
        """
        rank, world_size = self._rank_and_world_size()
        places = self.validation_places()
        mine = places[rank::world_size]
        measured = len(mine)
        mine += places[: math.ceil(len(places) / world_size) - measured]
        for first in range(0, len(mine), self.training_steps.share):
            here = mine[first : first + self.training_steps.share]
            windows = [self.validation_sources[source].window(number) for source, number in here]
            batch = batch_of_windows(windows, self.config.data.document_masking)
            batch.targets[max(0, measured - first) :] = IGNORED
            yield batch

    def epochs_at(self, step: int) -> float:
        """Passes over the training windows after so many steps."""
        return step * self.config.windows_per_step / self.training_steps.order.windows_per_epoch

    def steps_of(self, epochs: float) -> int:
        """The fewest whole steps that show the training windows so many times."""
        return math.ceil(epochs * self.training_steps.order.windows_per_epoch / self.config.windows_per_step)

    def validation_places(self) -> list[tuple[int, int]]:
        """Source and window of each held-out window that is evaluated, spread evenly over all."""
        places = [
            (source, number) for source, windows in enumerate(self.validation_sources) for number in range(len(windows))
        ]
        wanted = min(self.config.data.validation_windows or len(places), len(places))
        return [places[index * len(places) // wanted] for index in range(wanted)]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run, read when it is first needed."""
        return self.read_tokenizer()

    def read_tokenizer(self) -> Tokenizer:
        """The tokenizer that the configuration names."""
        path = self.config.tokenizer.path
        assert path is not None
        tokenizer = Tokenizer.load(Path(path).expanduser())
        if tokenizer.vocab_size > self.config.model.vocab_size:
            raise UserError(
                f"{path} has {tokenizer.vocab_size:,} entries and the model only {self.config.model.vocab_size:,} "
                f"rows: set model.vocab_size={tokenizer.vocab_size}"
            )
        return tokenizer

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


def free_shared_memory(folder: Path) -> int | None:
    """Bytes that are free in the folder of shared memory; None where there is no such folder, and no such limit."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def short_hash(*parts: object) -> str:
    """A name for what was made from these parts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _unchanged(batch: Any) -> Any:
    """Collates nothing: the default would turn the tuple of counts into a list."""
    return batch


def _leave_signals_to_the_parent(worker: int) -> None:
    """Signals may be sent to every process of a job or a terminal; a reader must live until the step is saved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
