"""Windows of tokens, and the batches that a run trains on.

n  windows of one device in one step
T  sequence_length
W  windows of one step over all devices
"""

from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from cucafera.config.schema import Config
from cucafera.data.order import WindowOrder

IGNORED = -100
"""A target with this value is not trained on; the value is that of torch.nn.functional.cross_entropy."""


class Window(NamedTuple):
    """One training example: three arrays [T] of int32.

    Attributes:
        input_ids: Token ids.
        targets: The next token of each, or IGNORED.
        documents: Number of the document or conversation that each token belongs to, consecutive within the window.
    """

    input_ids: NDArray[np.int32]
    targets: NDArray[np.int32]
    documents: NDArray[np.int32]


class WindowSource(Protocol):
    """The windows of one source."""

    def __len__(self) -> int:
        """Number of windows."""
        ...

    def window(self, number: int) -> Window:
        """The window of this number."""
        ...

    def lengths(self, most_tokens: int) -> NDArray[np.int64]:
        """Tokens of each document or conversation, [n], before it is cut or packed; of larger sources, of some."""
        ...


Source = TypeVar("Source", bound=WindowSource)


class Batch(NamedTuple):
    """Windows of one device.

    Attributes:
        input_ids: [n, T] int32.
        targets: [n, T] int32: the next token of each, or IGNORED.
        documents: [n, T] int32: number of the document that each token belongs to, within its window;
            None where tokens may attend to the full window.
        document_counts: Number of documents in each of the n windows, known without asking the device; None where
            documents is None.
    """

    input_ids: Tensor
    targets: Tensor
    documents: Tensor | None
    document_counts: tuple[int, ...] | None

    def split(self, windows: int) -> Iterator["Batch"]:
        """Yield batches of at most `windows` windows."""
        for first in range(0, len(self.input_ids), windows):
            part = slice(first, first + windows)
            yield Batch(
                self.input_ids[part],
                self.targets[part],
                None if self.documents is None else self.documents[part],
                None if self.document_counts is None else self.document_counts[part],
            )

    def padded(self, windows: int) -> "Batch":
        """Return a batch of `windows` windows; those that are added have no targets, and are one document each."""
        added = windows - len(self.input_ids)
        missing = (0, 0, 0, added)
        return Batch(
            F.pad(self.input_ids, missing),
            F.pad(self.targets, missing, value=IGNORED),
            None if self.documents is None else F.pad(self.documents, missing),
            None if self.document_counts is None else self.document_counts + (1,) * added,
        )


def batch_of_windows(windows: Sequence[Window], document_masking: bool) -> Batch:
    """Collate the windows of a device."""
    input_ids, targets, documents = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*windows, strict=True))
    if not document_masking:
        return Batch(input_ids, targets, None, None)
    counts = documents[:, -1] - documents[:, 0] + 1  # documents are numbered consecutively
    return Batch(input_ids, targets, documents, tuple(counts.tolist()))


class TrainingSteps(Dataset[Batch]):
    """Step s of the run: its share of the windows [s W, (s + 1) W), unless batches are skipped.

    Args:
        sources: The training windows of each source.
        order: The order in which they are seen.
        config: The run.
        skipped_batches: Numbers of batches that rollbacks skip.
        rank, world_size: Which share.
    """

    def __init__(
        self,
        sources: Sequence[WindowSource],
        order: WindowOrder,
        config: Config,
        skipped_batches: Sequence[int],
        rank: int,
        world_size: int,
    ) -> None:
        self.sources = sources
        self.config = config
        self.skipped_batches = sorted(skipped_batches)
        self.rank = rank
        self.share = config.windows_per_step // world_size
        self.order = order

    def batch_at(self, step: int) -> int:
        """Return the number b of the batch of a step, which is 0 for the first: the windows [b W, (b + 1) W)."""
        batch = step
        for skipped in self.skipped_batches:
            batch += skipped <= batch
        return batch

    def positions(self, step: int) -> list[tuple[int, int]]:
        """Return source and number of each window of this share of a step, in their order."""
        batch = self.batch_at(step)
        if self.config.data.overfit_steps is not None:
            batch %= self.config.data.overfit_steps
        first = batch * self.config.windows_per_step + self.rank * self.share
        sources, numbers = self.order.windows(first, self.share)
        return list(zip(sources.tolist(), numbers.tolist(), strict=True))

    def __getitem__(self, step: int) -> Batch:
        windows = [self.sources[source].window(number) for source, number in self.positions(step)]
        return batch_of_windows(windows, self.config.data.document_masking)


class OpenedSource(NamedTuple, Generic[Source]):
    """The windows of one source.

    Attributes:
        training, validation: Windows to train on and held-out windows.
        fingerprint: A hash of the training data.
        notes: Facts about the source that a person should know, as clauses.
    """

    training: Source
    validation: Source
    fingerprint: str
    notes: Sequence[str] = ()
