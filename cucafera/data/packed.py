"""Pretraining batches: windows of the token stream, in an order that the seed alone decides.

n  windows of one device in one step
T  sequence_length
"""

import hashlib
import json
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cucafera.config import Config, SourceConfig, UserError
from cucafera.data.corpus import ReadCounts, is_held_out, read_source, source_fingerprint
from cucafera.data.order import WindowOrder
from cucafera.data.shards import MANIFEST, TokenStream, prepare_source
from cucafera.data.tokenizer import DOCUMENT_START_ID, Tokenizer

log = logging.getLogger(__name__)

IGNORED = -100
"""A target with this value is not trained on; the value is that of torch.nn.functional.cross_entropy."""


class Batch(NamedTuple):
    """Windows of one device.

    Attributes:
        input_ids: [n, T] int64.
        targets: [n, T] int64: the next token of each, or IGNORED.
        documents: [n, T] int32: number of the document that each token belongs to, within its window;
            None where tokens may attend to the whole window.
    """

    input_ids: Tensor
    targets: Tensor
    documents: Tensor | None

    def split(self, windows: int) -> Iterator["Batch"]:
        """Batches of at most so many windows."""
        for first in range(0, len(self.input_ids), windows):
            part = slice(first, first + windows)
            yield Batch(
                self.input_ids[part], self.targets[part], None if self.documents is None else self.documents[part]
            )


def batch_of_windows(windows: np.ndarray, document_masking: bool) -> Batch:
    """The batch of windows [n, T + 1] of token ids."""
    ids = torch.from_numpy(windows.astype(np.int64))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    documents = (inputs == DOCUMENT_START_ID).cumsum(1, dtype=torch.int32) if document_masking else None
    return Batch(inputs, targets, documents)


class TrainingSteps(Dataset[Batch]):
    """Step s of the run: its share of the windows [s W, (s + 1) W).

    Args:
        streams: The training tokens of each source.
        config: The run.
        rank, world_size: Which share.
    """

    def __init__(self, streams: list[TokenStream], config: Config, rank: int, world_size: int) -> None:
        self.streams = streams
        self.config = config
        self.rank = rank
        self.share = config.windows_per_step // world_size
        weights = [source.weight for source in config.data.sources.values()]
        self.order = WindowOrder([_windows_in(s, config.sequence_length) for s in streams], weights, config.seed)

    def __getitem__(self, step: int) -> Batch:
        if self.config.data.overfit_steps is not None:
            step %= self.config.data.overfit_steps
        first = step * self.config.windows_per_step + self.rank * self.share
        sources, windows = self.order.windows(first, self.share)
        length = self.config.sequence_length
        tokens = np.stack(
            [
                self.streams[source].read(int(window) * length, length + 1)
                for source, window in zip(sources, windows, strict=True)
            ]
        )
        return batch_of_windows(tokens, self.config.data.document_masking)


class StepsLeft(Sampler[int]):
    """The steps of a run from one on."""

    def __init__(self, first: int, total: int) -> None:
        self.steps = range(first, total)

    def __iter__(self) -> Iterator[int]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)


class PackedDataModule(pl.LightningDataModule):
    """Corpus, tokenizer, shards and windows of a pretraining run.

    Args:
        config: The run.
        first_step: The step that training begins or goes on with.
        num_workers: Processes that read windows; 0: the training process.
        pin_memory: Put batches into memory that a GPU can copy from at once.
        expected: What `identity` was when the weights were trained that training goes on or begins with, as far as
            it must be the same.

    Attributes:
        tokenizer: Known after `setup`.
        identity: Hashes of what the weights depend on, the tokenizer and the training tokens of each source; known
            after `setup`, and the same until the end, whatever becomes of the files meanwhile.
    """

    tokenizer: Tokenizer
    identity: dict[str, str]

    def __init__(
        self,
        config: Config,
        first_step: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        expected: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.first_step = first_step
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.expected = expected or {}
        self.prepared = Path(config.data.prepared_dir)

    def prepare_data(self) -> None:
        """Trains the tokenizer and writes the shards that are not there yet; runs in one process of the job."""
        tokenizer = self._tokenizer()
        for name, source in self.config.data.sources.items():
            prepare_source(
                name,
                source,
                tokenizer,
                self._shard_folder(source, tokenizer),
                validation_fraction=self.config.data.validation_fraction,
                shard_tokens=self.config.data.shard_tokens,
                skip_broken_lines=self.config.data.skip_broken_lines,
                processes=self.config.data.processes,
            )

    def setup(self, stage: str | None = None) -> None:
        """Opens tokenizer and shards.

        Raises:
            UserError: tokenizer or text are not those that the weights were trained with, the tokenizer does not fit
                the model, or there is too little text for one window.
        """
        self.tokenizer = self._tokenizer()
        fingerprint, vocabulary = self.tokenizer.fingerprint, self.config.model.vocab_size
        self.identity = {"tokenizer": fingerprint}
        self.training_streams, self.validation_streams = [], []
        for name, source in self.config.data.sources.items():
            folder = self._shard_folder(source, self.tokenizer)
            self.training_streams.append(TokenStream.open(folder / "train", fingerprint, vocabulary))
            self.validation_streams.append(TokenStream.open(folder / "validation", fingerprint, vocabulary))
            manifest = (folder / "train" / MANIFEST).read_bytes()
            self.identity[f"data.sources.{name}"] = hashlib.sha256(manifest).hexdigest()
        self._refuse_other_text()
        length = self.config.sequence_length
        for name, stream in zip(self.config.data.sources, self.training_streams, strict=True):
            if not _windows_in(stream, length):
                raise UserError(
                    f"data.sources.{name} gives {len(stream):,} training tokens; one window needs {length + 1:,} "
                    "(sequence_length + 1): give more text, or a smaller sequence_length"
                )
        if not sum(_windows_in(stream, length) for stream in self.validation_streams):
            raise UserError(
                f"the held-out documents give {sum(map(len, self.validation_streams)):,} tokens; one window needs "
                f"{length + 1:,}: give more documents, or a larger data.validation_fraction (a .txt file is one "
                "document unless its source has a document_separator)"
            )
        self.training_steps = TrainingSteps(self.training_streams, self.config, *self._rank_and_world_size())

    def _refuse_other_text(self) -> None:
        changed = [name for name, value in self.expected.items() if self.identity.get(name) != value]
        if changed:
            raise UserError(
                f"{' and '.join(changed)} {'is' if len(changed) == 1 else 'are'} not what these weights were trained "
                "with: their files have changed, or a tokenizer was trained on other text. Bring them back, set "
                "tokenizer.path to the tokenizer.json of the run, or begin a new run under another name=..."
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        """The steps that are left, each a Batch of this device's windows."""
        return DataLoader(
            self.training_steps,
            sampler=StepsLeft(self.first_step, self.config.total_steps),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_leave_interrupts_to_the_parent,
            prefetch_factor=4 if self.num_workers else None,
        )

    def val_dataloader(self) -> Iterator[Batch]:
        """This device's share of the held-out windows, in batches as large as a training step's."""
        rank, world_size = self._rank_and_world_size()
        places = self._validation_places()[rank::world_size]
        for first in range(0, len(places), self.training_steps.share):
            length = self.config.sequence_length
            windows = [
                self.validation_streams[source].read(window * length, length + 1)
                for source, window in places[first : first + self.training_steps.share]
            ]
            yield batch_of_windows(np.stack(windows), self.config.data.document_masking)

    def epochs_at(self, step: int) -> float:
        """Passes over the training windows after so many steps."""
        return step * self.config.windows_per_step / self.training_steps.order.windows_per_epoch

    def describe(self) -> str:
        """The amounts of text, for the terminal."""
        training, held_out = sum(map(len, self.training_streams)), sum(map(len, self.validation_streams))
        return (
            f"Data    {training:,} training tokens, seen {self.epochs_at(self.config.total_steps):.2f} times; "
            f"{held_out:,} held out, {len(self._validation_places()):,} windows of them evaluated"
        )

    def _validation_places(self) -> list[tuple[int, int]]:
        """Source and window of each held-out window that is evaluated, spread evenly over all."""
        length = self.config.sequence_length
        places = [
            (source, window)
            for source, stream in enumerate(self.validation_streams)
            for window in range(_windows_in(stream, length))
        ]
        wanted = min(self.config.data.validation_windows or len(places), len(places))
        return [places[index * len(places) // wanted] for index in range(wanted)]

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def _tokenizer(self) -> Tokenizer:
        """The tokenizer that the configuration names, or the one trained on its corpus, trained now if need be."""
        settings = self.config.tokenizer
        if settings.path is not None:
            tokenizer = Tokenizer.load(Path(settings.path).expanduser())
            if tokenizer.vocab_size > self.config.model.vocab_size:
                raise UserError(
                    f"{settings.path} has {tokenizer.vocab_size:,} entries and the model only "
                    f"{self.config.model.vocab_size:,} rows: set model.vocab_size={tokenizer.vocab_size}"
                )
            return tokenizer
        path = self.prepared / f"tokenizer-{self._tokenizer_key()}.json"
        if not path.exists():
            log.info("Training a tokenizer of %s entries", f"{settings.vocab_size:,}")
            tokenizer = Tokenizer.train(self._tokenizer_texts(), settings.vocab_size, show_progress=sys.stderr.isatty())
            path.parent.mkdir(parents=True, exist_ok=True)
            tokenizer.save(path)
        return Tokenizer.load(path)

    def _tokenizer_texts(self) -> Iterator[str]:
        """Training documents, from each source its share by weight of tokenizer.train_bytes; none held out."""
        data = self.config.data
        total_weight = sum(source.weight for source in data.sources.values())
        for name, source in data.sources.items():
            left = self.config.tokenizer.train_bytes * source.weight / total_weight
            for text, _ in read_source(name, source, data.skip_broken_lines, ReadCounts()):
                if is_held_out(text, data.validation_fraction):
                    continue
                yield text
                left -= len(text.encode())
                if left <= 0:
                    break

    def _tokenizer_key(self) -> str:
        settings, data = self.config.tokenizer, self.config.data
        sources = [(source_fingerprint(source), source.weight) for source in data.sources.values()]
        return _short_hash(sources, settings.vocab_size, int(settings.train_bytes), data.validation_fraction)

    def _shard_folder(self, source: SourceConfig, tokenizer: Tokenizer) -> Path:
        data = self.config.data
        settings = (data.validation_fraction, data.shard_tokens, data.skip_broken_lines)
        key = _short_hash(source_fingerprint(source), tokenizer.fingerprint, *settings)
        return self.prepared / f"shards-{key}"


def _leave_interrupts_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; a reader must live until the step has been saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _windows_in(stream: TokenStream, length: int) -> int:
    """Windows of length + 1 tokens, each beginning with the last token of the one before."""
    return max(0, (len(stream) - 1) // length)


def _short_hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
