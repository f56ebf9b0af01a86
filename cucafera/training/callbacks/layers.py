"""Statistics of each layer: gradient norms and activation scales."""

from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from torch import Tensor

from cucafera.config.schema import Config
from cucafera.data.windows import batch_of_windows
from cucafera.model.layer_statistics import activation_rms, gradient_norms
from cucafera.model.sharded import full_tensor
from cucafera.training.callbacks.base import Callback
from cucafera.training.callbacks.guards import Guards
from cucafera.training.callbacks.validation import Validation
from cucafera.training.data_module import data_of
from cucafera.training.events import event_logger
from cucafera.training.module import LanguageModel


class Layers(Callback):
    """Log the gradient norm of each layer on log steps, and the residual stream after it at validations.

    Both are read on steps that wait for the device anyway, and change nothing that training depends on.

    Emits, against steps, for each layer NN from 00 on and for the `embedding`:
        per_layer/gradient_norm/NN  norm of its gradient before clipping; not for steps whose update was not applied,
                                    nor for layers that are not trained
        per_layer/activation_rms/NN root mean square of the residual stream after it, on one held-out window
    """

    def __init__(self, config: Config, guards: Guards, validation: Validation) -> None:
        self.config = config
        self.guards = guards
        self.validation = validation
        self._clipped_norms: dict[str, Tensor] = {}

    def on_session_start(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Log the activations of a new model."""
        if module.steps_done == 0:
            self._write_activations(trainer, module)

    def on_gradients(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Compute the norms on a log step, while there are gradients."""
        if self.config.is_log_step(module.steps_done + 1):
            # A collective under FSDP, where each process has a shard of the gradients.
            self._clipped_norms = {name: full_tensor(norm) for name, norm in gradient_norms(module.model).items()}

    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Log the statistics of this step."""
        if self.config.is_log_step(module.steps_done):
            self._write_gradients(trainer, module)
            self._write_activations(trainer, module)

    def _write_gradients(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        record = self.guards.latest
        assert record is not None
        limit = self.config.optimizer.clip_norm
        if record.applied:
            # The gradients were clipped already; the global norm before clipping gives the factor.
            factor = 1.0 if limit is None else max(1.0, record.gradient_norm / limit)
            self._write(trainer, "gradient_norm", self._clipped_norms, factor, module.steps_done)
        self._clipped_norms = {}

    def _write_activations(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        if not self.validation.done_at(module.steps_done):
            return
        model = module.gather_full_model()
        if model is None:
            return
        data = data_of(trainer)
        source, number = data.validation_positions()[0]
        window = data.validation[source].window(number)
        batch = trainer.strategy.batch_to_device(batch_of_windows([window], self.config.data.document_masking))
        with trainer.precision_plugin.val_step_context():
            scales = activation_rms(model, batch.input_ids, batch.documents)
        self._write(trainer, "activation_rms", scales, 1.0, module.steps_done)

    def _write(self, trainer: pl.Trainer, name: str, by_layer: Mapping[str, Tensor], factor: float, step: int) -> None:
        if (logger := event_logger(trainer)) and by_layer:
            values = torch.stack(list(by_layer.values())).tolist()
            curves = {
                f"per_layer/{name}/{layer}": factor * value for layer, value in zip(by_layer, values, strict=True)
            }
            logger.log_metrics(curves, step=step)
