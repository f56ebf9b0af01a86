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
        reference_logprobs: Log-probability of the targets of each document under another model, in nats, float64 by
            document number, as far as documents have targets; None if no objective asks for it.
    """

    input_ids: NDArray[np.int32]
    targets: NDArray[np.int32]
    documents: NDArray[np.int32]
    reference_logprobs: NDArray[np.float64] | None = None


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
        reference_logprobs: [n, D] float64, for the D documents of the window that has most: see `Window`; 0 where there
            is none. None if no objective asks for it.
    """

    input_ids: Tensor
    targets: Tensor
    documents: Tensor | None
    document_counts: tuple[int, ...] | None
    reference_logprobs: Tensor | None = None

    def split(self, windows: int) -> Iterator["Batch"]:
        """Yield batches of at most `windows` windows."""
        for first in range(0, len(self.input_ids), windows):
            part = slice(first, first + windows)
            yield Batch(
                self.input_ids[part],
                self.targets[part],
                None if self.documents is None else self.documents[part],
                None if self.document_counts is None else self.document_counts[part],
                None if self.reference_logprobs is None else self.reference_logprobs[part],
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
            None if self.reference_logprobs is None else F.pad(self.reference_logprobs, missing),
        )


def batch_of_windows(windows: Sequence[Window], document_masking: bool) -> Batch:
    """Collate the windows of a device."""
    input_ids, targets, documents = (
        torch.from_numpy(np.stack(arrays)) for arrays in zip(*(window[:3] for window in windows), strict=True)
    )
    if not document_masking:
        return Batch(input_ids, targets, None, None)
    counts = tuple((documents[:, -1] - documents[:, 0] + 1).tolist())  # documents are numbered consecutively
    return Batch(input_ids, targets, documents, counts, _reference_logprobs(windows, max(counts)))


def _reference_logprobs(windows: Sequence[Window], documents: int) -> Tensor | None:
    """Return those of each window, [n, documents]; None if the windows have none."""
    rows = np.zeros((len(windows), documents))
    for row, window in zip(rows, windows, strict=True):
        if window.reference_logprobs is None:
            return None
        row[: len(window.reference_logprobs)] = window.reference_logprobs
    return torch.from_numpy(rows)


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
        fingerprint: A hash of the training data; of pairs, also of those held out.
        notes: Facts about the source that a person should know, as clauses.
    """

    training: Source
    validation: Source
    fingerprint: str
    notes: Sequence[str] = ()
