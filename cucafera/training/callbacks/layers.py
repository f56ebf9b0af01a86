"""Layer by layer: norms of gradients, scales of activations."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from cucafera.config import Config
from cucafera.data.windows import batch_of_windows
from cucafera.model.scales import activation_scales, gradient_norms
from cucafera.training.callbacks.guards import Guards
from cucafera.training.callbacks.validation import Validation
from cucafera.training.events import event_logger
from cucafera.training.module import LanguageModel, data_module_of
from cucafera.training.sharding import whole


class Layers(pl.Callback):
    """Measures each layer: its gradient on log steps, the residual stream behind it at validations.

    Both are read when the device has been waited for anyway, and change nothing that training depends on.

    Emits, against steps, for each layer NN from 00 on and for the `embedding`:
        layers/gradient_norm/NN     norm of its gradient before clipping; not of steps whose update was not applied,
                                    nor of what is not trained
        layers/activation_rms/NN    root mean square of the residual stream behind it, on one held-out window
    """

    def __init__(self, config: Config, guards: Guards, validation: Validation) -> None:
        self.config = config
        self.guards = guards
        self.validation = validation
        self._clipped_norms: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures the activations of a new model."""
        assert isinstance(pl_module, LanguageModel)
        if pl_module.steps_done == 0:
            self._write_activations(trainer, pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """On a log step: asks for the norms, while there are gradients."""
        assert isinstance(pl_module, LanguageModel)
        if self.config.is_log_step(pl_module.steps_done + 1):
            # Every process of the job takes part: of a gradient each may have a share.
            self._clipped_norms = {name: whole(norm) for name, norm in gradient_norms(pl_module.model).items()}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes what was measured."""
        assert isinstance(pl_module, LanguageModel)
        if self.config.is_log_step(pl_module.steps_done):
            self._write_gradients(trainer, pl_module)
            self._write_activations(trainer, pl_module)

    def _write_gradients(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        record = self.guards.latest
        assert record is not None
        limit = self.config.optimizer.clip_norm
        if record.applied:
            # The gradients had been clipped already; the norm of them all tells by how much.
            factor = 1.0 if limit is None else max(1.0, record.gradient_norm / limit)
            self._write(trainer, "gradient_norm", self._clipped_norms, factor, module.steps_done)
        self._clipped_norms = {}

    def _write_activations(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        if not self.validation.done_at(module.steps_done):
            return
        model = module.whole_model()
        if model is None:
            return
        data = data_module_of(trainer)
        source, number = data.validation_places()[0]
        window = data.validation_sources[source].window(number)
        batch = trainer.strategy.batch_to_device(batch_of_windows([window], self.config.data.document_masking))
        with trainer.precision_plugin.val_step_context():
            scales = activation_scales(model, batch.input_ids, batch.documents)
        self._write(trainer, "activation_rms", scales, 1.0, module.steps_done)

    def _write(self, trainer: pl.Trainer, what: str, measured: Mapping[str, Tensor], factor: float, step: int) -> None:
        if (logger := event_logger(trainer)) and measured:
            values = torch.stack(list(measured.values())).tolist()
            curves = {f"layers/{what}/{name}": factor * value for name, value in zip(measured, values, strict=True)}
            logger.log_metrics(curves, step=step)
