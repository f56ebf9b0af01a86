"""Tokenizer and windows of a run, whatever its objective makes windows of."""

import functools
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic

from cucafera.config.errors import UserError
from cucafera.config.schema import Config
from cucafera.data.left_out import LeftOut
from cucafera.data.order import WindowOrder
from cucafera.data.tokenizer import Tokenizer
from cucafera.data.windows import IGNORED, Batch, OpenedSource, Source, TrainingSteps, batch_of_windows
from cucafera.quantities import number_of


class RunData(ABC, Generic[Source]):
    """The data of a run, open for reading.

    Args:
        config: The run.
        tokenizer: Its tokenizer.
        sources: The windows of each source, by name, in the order of the configuration.
        left_out: What of the sources is left out, or not used as it is.

    Attributes:
        training, validation: Training windows and held-out windows of each source.
        notes: Facts about the sources that a person should know, such as files without rows.
        fingerprints: Hashes of what trained weights depend on: the tokenizer and the training data of each source. They
            stay the same until the end, whatever becomes of the files meanwhile.
        noun: What a source holds many of; the lengths of its windows are about these.
        piece: What is a document of its own in a window.
        use: What becomes of targets in training.
    """

    noun = "document"
    piece = "document"
    use = "trained on"

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        sources: Mapping[str, OpenedSource[Source]],
        left_out: Sequence[LeftOut],
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.left_out = left_out
        self.training = [source.training for source in sources.values()]
        self.validation = [source.validation for source in sources.values()]
        self.notes = [f"{name}: {note}" for name, source in sources.items() for note in source.notes]
        self.fingerprints = {"tokenizer": tokenizer.fingerprint}
        self.fingerprints |= {f"data.sources.{name}": source.fingerprint for name, source in sources.items()}

    @abstractmethod
    def describe(self) -> str:
        """Return the amounts of data, for the terminal."""

    def name_of_piece(self, number: int) -> str:
        """Return the name of a document of a window, for a person; the first one is number 0."""
        return f"{self.piece} {number + 1}"

    def check_fingerprints(self, expected: Mapping[str, str]) -> None:
        """Refuse data or a tokenizer other than those that weights were trained with.

        Args:
            expected: `fingerprints` of that time, as far as they must be the same.

        Raises:
            UserError: Some differ.
        """
        changed = [name for name, value in expected.items() if self.fingerprints.get(name) != value]
        if not changed:
            return
        values = "".join(
            f"\n  - {name}: fingerprint {self.fingerprints.get(name, 'none')[:16]} (now) != {expected[name][:16]} "
            "(trained with)"
            for name in changed
        )
        raise UserError(
            f"{' and '.join(changed)} {'is' if len(changed) == 1 else 'are'} not what these weights were trained with: "
            f"the files have changed, or a tokenizer was trained on other text.{values}\n"
            "Restore the original files, set tokenizer.path to the tokenizer.json of the run, start a new run under "
            f"another name=..., or continue with the changed data: 'resume_allow_changed=[{','.join(changed)}]'"
        )

    @functools.cached_property
    def order(self) -> WindowOrder:
        """The order in which training windows are seen."""
        weights = [source.weight for source in self.config.data.sources.values()]
        return WindowOrder([len(windows) for windows in self.training], weights, self.config.seed)

    def training_steps(self, skipped_batches: Sequence[int], rank: int = 0, world_size: int = 1) -> TrainingSteps:
        """Return this device's share of every step."""
        return TrainingSteps(self.training, self.order, self.config, skipped_batches, rank, world_size)

    def validation_batches(self, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield this device's share of the held-out windows, in batches as large as a training step's.

        Every device has as many, since all may have to take part in a forward pass: where one is missing, there is one
        without targets.
        """
        positions = self.validation_positions()
        own = positions[rank::world_size]
        measured = len(own)
        own += positions[: math.ceil(len(positions) / world_size) - measured]
        share = self.config.windows_per_step // world_size
        for first in range(0, len(own), share):
            windows = [self.validation[source].window(number) for source, number in own[first : first + share]]
            batch = batch_of_windows(windows, self.config.data.document_masking)
            batch.targets[max(0, measured - first) :] = IGNORED
            yield batch

    def validation_positions(self) -> list[tuple[int, int]]:
        """Return source and number of each held-out window that is evaluated, spread evenly over all."""
        positions = [
            (source, number) for source, windows in enumerate(self.validation) for number in range(len(windows))
        ]
        wanted = min(self.config.data.validation_windows or len(positions), len(positions))
        return [positions[index * len(positions) // wanted] for index in range(wanted)]

    def epochs_at(self, step: int) -> float:
        """Return the passes over the training windows after a number of steps."""
        return step * self.config.windows_per_step / self.order.windows_per_epoch

    def steps_of(self, epochs: float) -> int:
        """Return the fewest steps that show the training windows `epochs` times."""
        return math.ceil(epochs * self.order.windows_per_epoch / self.config.windows_per_step)


def load_tokenizer(config: Config) -> Tokenizer:
    """Return the tokenizer of the file that the configuration names.

    Raises:
        UserError: It cannot be read, or has more entries than the model has rows.
    """
    assert config.tokenizer.path is not None
    path = Path(config.tokenizer.path).expanduser()
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{path} has {number_of(tokenizer.vocab_size, 'entry')} and the model only "
            f"{number_of(config.model.vocab_size, 'row')}: set "
            f"model.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def short_hash(*parts: object) -> str:
    """Return a name for what is made from these parts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
