"""Log-probabilities of the answers under the initial weights, which preference tuning compares with."""

import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray

from cucafera.config.errors import UserError
from cucafera.config.schema import Config
from cucafera.data.prepared import SUMMARY, damaged, prepare_once, read_summary
from cucafera.data.run_data import short_hash
from cucafera.data.windows import batch_of_windows
from cucafera.model.transformer import Decoder
from cucafera.quantities import number_of
from cucafera.storage import file_sha256, flush, write_json_with_checksum
from cucafera.training.callbacks.base import Callback
from cucafera.training.callbacks.interruption import Interruption
from cucafera.training.data_module import data_of
from cucafera.training.hardware import Hardware
from cucafera.training.module import LanguageModel

log = logging.getLogger(__name__)

VERSION = 1
"""Increased whenever the same weights and data would give other values."""
FILE = "logprobs.npz"

Tables = list[NDArray[np.float64]]
"""A table [pairs, 2] for each set of windows: training windows of each source, then held-out windows of each."""


class ReferenceLogprobs(Callback):
    """Compute the reference log-probabilities before the first step, or read those that an earlier run computed.

    They are kept next to the prepared data, in a folder named by a hash of all that they depend on: weights, data,
    tokenizer, window, precision and kernels. So the runs of a sweep compute them once. A run has a copy of its own in
    its checkpoints: to resume it needs neither that folder nor the model that it began with.

    With adapters, which add nothing before the first step, the reference is the model without them. No random number
    is drawn.
    """

    def __init__(self, config: Config, hardware: Hardware, interruption: Interruption) -> None:
        self.config = config
        self.hardware = hardware
        self.interruption = interruption
        self.tables: Tables | None = None
        self.fingerprints: dict[str, str] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the tables, and the fingerprints of their data."""
        tables = [torch.from_numpy(table) for table in self.tables or []]
        return {"tables": tables, "fingerprints": self.fingerprints}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the tables, and the fingerprints of their data."""
        self.tables = [table.cpu().numpy() for table in state_dict["tables"]]
        self.fingerprints = state_dict["fingerprints"]

    def on_session_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Give the windows their log-probabilities.

        Raises:
            UserError: The run is resumed with other pairs, or from a loss without a reference.
        """
        data = data_of(trainer)
        windows = [*data.training, *data.validation]
        if module.steps_done == 0:
            self.fingerprints = data.fingerprints
            with self.interruption.exit_at_signal():
                self.tables = self._initial_tables(trainer, module, windows)
        elif self.tables is None or self.fingerprints != data.fingerprints:
            why = "its loss had no reference" if self.tables is None else "they are of other pairs"
            raise UserError(
                f"the run cannot continue with changed settings: it has no log-probabilities of these pairs under the "
                f"model that it began with, since {why}. Start a new run under another name=..., if you like with "
                f"init_from={self.config.run_dir}"
            )
        for source, table in zip(windows, self.tables, strict=True):
            source.reference_logprobs = table

    def _initial_tables(self, trainer: pl.Trainer, module: LanguageModel, windows: Sequence[Any]) -> Tables:
        model = module.gather_full_model()
        folder = trainer.strategy.broadcast(self._folder(trainer, model) if model is not None else None)
        assert folder is not None
        is_known = trainer.strategy.broadcast((folder / SUMMARY).exists())
        if not is_known:
            pairs = sum(source.pairs for source in windows)
            if trainer.is_global_zero:
                log.info("Computing the log-probabilities of %s under the initial model", number_of(pairs, "pair"))
            tables = self._computed(trainer, module, windows)
            if trainer.is_global_zero:
                prepare_once("reference", folder, lambda partial: _write(partial, tables))
            return tables
        if trainer.is_global_zero:
            log.info("The log-probabilities under the initial model are those of an earlier run, in %s", folder)
        return _read(folder)

    def _folder(self, trainer: pl.Trainer, model: Decoder) -> Path:
        """The folder of the tables."""
        config, hardware = self.config, self.hardware
        settings = (hardware.precision, hardware.residual_precision, hardware.document_attention, hardware.compile)
        key = short_hash(
            VERSION, weights_fingerprint(model), data_of(trainer).fingerprints, config.sequence_length, *settings
        )
        return Path(config.data.prepared_dir) / f"reference-{key}"

    @torch.no_grad()
    def _computed(self, trainer: pl.Trainer, module: LanguageModel, windows: Sequence[Any]) -> Tables:
        """Compute the tables, each device its share of the windows."""
        module.eval()
        tables = []
        for source in windows:
            table = torch.zeros(source.pairs, 2, dtype=torch.float64, device=module.device)
            numbers = list(range(len(source)))
            own = numbers[trainer.global_rank :: trainer.world_size]
            # All devices take part in a forward pass under fsdp: one that has fewer windows repeats some.
            padded = own + numbers[: math.ceil(len(numbers) / trainer.world_size) - len(own)]
            size = module.micro_batch_windows
            for first in range(0, len(padded), size):
                part = padded[first : first + size]
                batch = batch_of_windows([source.window(number) for number in part], self.config.data.document_masking)
                batch = trainer.strategy.batch_to_device(batch)
                with trainer.precision_plugin.val_step_context():
                    logprobs = module.reference_logprobs(batch)
                for number, row in list(zip(part, logprobs, strict=True))[: max(0, len(own) - first)]:
                    pairs = source.pairs_of(number)
                    table[pairs] = row[: 2 * len(pairs)].view(-1, 2)
            if trainer.world_size > 1:
                torch.distributed.all_reduce(table)
            tables.append(table.cpu().numpy())
        module.train()
        return tables


def weights_fingerprint(model: Decoder) -> str:
    """Return the SHA-256 of the names, types and values of the weights, adapters left out."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if ".lora_" not in name:
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(folder: Path, tables: Tables) -> None:
    folder.mkdir(parents=True)
    with (folder / FILE).open("wb") as file:
        np.savez(file, *tables)
        flush(file)
    write_json_with_checksum(folder / SUMMARY, {"sha256": file_sha256(folder / FILE)})


def _read(folder: Path) -> Tables:
    """Load tables that `_write` wrote. Raises PreparedDataError if they are damaged."""
    path = folder / FILE
    try:
        if file_sha256(path) != read_summary(folder)["sha256"]:
            raise damaged(path, "checksum mismatch")
        with np.load(path) as arrays:
            return [arrays[name] for name in arrays.files]
    except OSError as error:
        raise damaged(path, f"it cannot be read ({error.strerror})") from error
