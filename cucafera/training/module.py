"""The LightningModule: one optimizer step from the windows of one step.

    n  windows of this device in one step
    T  sequence_length

A Lightning batch is a full optimizer step, not a micro-batch. So the step's number of units (targets, pairs) is known
before its first backward pass, every Lightning interval is in steps, and gradient accumulation needs no bookkeeping
outside `training_step`.
"""

import contextlib
import dataclasses
import logging
import random
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from cucafera.config.errors import UserError
from cucafera.config.registry import OPTIMIZERS
from cucafera.config.schema import Config, ModelConfig
from cucafera.data.windows import IGNORED, Batch
from cucafera.model.attention import document_limit
from cucafera.model.lora import add_adapters
from cucafera.model.sharded import full_tensor
from cucafera.model.transformer import Decoder
from cucafera.objectives import objective_of
from cucafera.optimizers import OptimizerSpec, build_optimizer, set_learning_rate
from cucafera.training.data_module import data_module_of, data_of
from cucafera.training.first_steps import FirstSteps
from cucafera.training.gradient_check import compiled_gradient_fault
from cucafera.training.hardware import Hardware
from cucafera.training.schedules import lr_ratio
from cucafera.training.sharding import FullySharded

log = logging.getLogger(__name__)


class StepRecord(NamedTuple):
    """Metrics of one optimizer step.

    Attributes:
        step: Its number; the first is 1.
        loss: Mean over its units: nats per token for next-token objectives.
        gradient_norm: Global norm before clipping.
        applied: False if loss or gradient norm was not finite, and so the weights were not updated.
    """

    step: int
    loss: float
    gradient_norm: float
    applied: bool


def build_decoder(config: ModelConfig, hardware: Hardware) -> Decoder:
    """Return a decoder to train, set up for a device.

    Raises:
        UserError: FlashAttention 3 or 4 is asked for and not available.
    """
    attention = hardware.document_attention
    if attention in ("flash3", "flash4"):
        from cucafera.model.flash_attention import activate_flash_attention

        activate_flash_attention(attention, hardware.name, torch.cuda.get_device_capability())
        attention = "flash"
    residual_dtype = torch.bfloat16 if hardware.residual_precision == "bf16" else None
    return Decoder(config, hardware.activation_checkpointing, attention, residual_dtype)


class LanguageModel(pl.LightningModule):
    """Trains a Decoder. Its state dict is that of Hugging Face's LlamaForCausalLM with a tied head, and the adapters.

    Args:
        config: The run.
        hardware: Windows per forward pass; whether the decoder is compiled, in place, when training starts; and whether
            it keeps its activations.
    """

    def __init__(self, config: Config, hardware: Hardware) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.objective = objective_of(config)
        self.optimizer_spec: OptimizerSpec = OPTIMIZERS.get(config.optimizer.name)
        self.micro_batch_windows = hardware.micro_batch_windows
        self.compile_model = hardware.compile
        self.document_limit = 0
        self.gradients_to_check = hardware.compile and config.trainer.check_gradients
        self.model = build_decoder(config.model, hardware)
        add_adapters(self.model, config.adapter)
        self.steps_done = 0
        self._pending_metrics: list[Tensor] = []
        self.other_hooks_done_at = time.perf_counter()

    def setup(self, stage: str) -> None:
        """Take what validation needs from the data, and compile."""
        tokenizer = data_of(self.trainer).tokenizer
        metrics = self.objective.validation_metrics(self.config.objective, tokenizer, self.config.model.vocab_size)
        self.validation_metrics = metrics.to(self.device)
        if self.compile_model:
            # Under fsdp, whose hooks cannot be compiled, graph breaks leave one graph per block, shared by all, and the
            # loss. Shapes are the same at every step, and code compiled for dynamic shapes is slower.
            self.model.compile(dynamic=False)

    def configure_model(self) -> None:
        """Shard the weights over the devices, under fsdp."""
        if isinstance(self.trainer.strategy, FullySharded):
            self.trainer.strategy.shard(self.model)

    def gather_full_model(self) -> Decoder | None:
        """Return the decoder with all weights, in the first process; None in the others.

        A collective operation: every process must call it.
        """
        is_first = self.trainer.is_global_zero
        if not isinstance(self.trainer.strategy, FullySharded):
            return self.model if is_first else None
        weights = {}
        for name, weight in self.model.state_dict().items():
            gathered = full_tensor(weight)  # a collective
            if is_first:
                weights[name] = gathered
        if not is_first:
            return None
        with torch.device("meta"):
            model = Decoder(self.config.model)
            add_adapters(model, self.config.adapter)
        model.load_state_dict(weights, assign=True)
        with self.device:
            model.make_rotary_tables()
        return model.requires_grad_(False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the configured optimizer over the trainable parameters.

        A checkpoint restores its state alone: settings such as the weight decay are those of the configuration.
        """
        optimizer = build_optimizer(self.model, self.config.optimizer)
        settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]

        def keep_settings(restored: torch.optim.Optimizer) -> None:
            for group, configured in zip(restored.param_groups, settings, strict=True):
                group.update(configured)

        optimizer.register_load_state_dict_post_hook(keep_settings)
        return optimizer

    def learning_rate(self, step: int) -> float:
        """Return the peak learning rate times the schedule's ratio at a step."""
        return self.config.optimizer.lr * lr_ratio(step, self.config.schedule, self.config.horizon_steps)

    def on_train_start(self) -> None:
        """Set Lightning's step counter: its own loop state is not in the checkpoint."""
        self.first_steps = FirstSteps(self.model, self.steps_done)
        self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = self.steps_done
        self.other_hooks_done_at = time.perf_counter()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Take one optimizer step.

        The loss is the sum over all units of the step, on all devices, divided by their number: it does not depend
        on how the windows are divided into micro-batches and devices.

        Args:
            batch: The windows of this device: tensors [n, T].
            batch_idx: Not used; `steps_done` counts over the whole run.
        """
        optimizer = cast(LightningOptimizer, self.optimizers())
        set_learning_rate(optimizer.optimizer, self.learning_rate(self.steps_done))

        units_in_step = self.objective.units(batch)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(units_in_step)
        micro_batches = list(batch.split(self.micro_batch_windows))
        self._raise_document_limit(micro_batches)
        if self.gradients_to_check:
            self._check_gradients(micro_batches[0])
        loss = torch.zeros((), device=self.device)
        for index, micro_batch in enumerate(micro_batches):
            with self._gradients_stay_local(index < len(micro_batches) - 1):
                loss_of = self.objective.loss(
                    self.config.objective, self.model, micro_batch, self.document_limit or None
                )
                share = loss_of / units_in_step
                # DDP and FSDP average gradients over devices; this loss is a sum over them.
                self.manual_backward(share * self.trainer.world_size)
            loss += share.detach()

        if not self.first_steps.has_seen_enough:
            self.first_steps.watch(self.learning_rate(self.steps_done))
        gradient_norm = self._clip_gradients()
        found_nonfinite = self._found_nonfinite(loss, gradient_norm)
        self._apply_update(optimizer, found_nonfinite)
        optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        self._pending_metrics.append(torch.stack([loss, gradient_norm, found_nonfinite]))

    def _apply_update(self, optimizer: LightningOptimizer, found_nonfinite: Tensor) -> None:
        """Update the weights, unless the loss or a gradient is not finite: then weights and optimizer state stay."""
        if self.optimizer_spec.reads_found_inf:
            # The fused kernel leaves weights and moments untouched where this is 1; no wait for the device.
            optimizer.optimizer.found_inf = found_nonfinite  # type: ignore[attr-defined]
            optimizer.step()
        elif not found_nonfinite.item():
            optimizer.step()

    def _raise_document_limit(self, micro_batches: Sequence[Batch]) -> None:
        """Raise the number of documents per micro-batch that flash attention has room for: a tensor of fixed size."""
        if self.model.document_attention == "flash":
            most = max(sum(micro_batch.document_counts or ()) for micro_batch in micro_batches)
            self.document_limit = document_limit(most, self.document_limit)

    def _check_gradients(self, micro_batch: Batch) -> None:
        """Compare the gradients of the compiled model with those of the uncompiled one, once. Raises UserError.

        A micro-batch without any target shows nothing: the next step is checked instead.
        """
        self.gradients_to_check = not bool((micro_batch.targets != IGNORED).any())
        if self.gradients_to_check:
            return
        if isinstance(self.trainer.strategy, FullySharded):
            return  # gradients exist only after a complete backward pass; each block is compiled by itself
        try:
            fault = compiled_gradient_fault(
                self.model, micro_batch, self.document_limit or None, self.objective.cross_entropy
            )
        except torch.OutOfMemoryError:
            log.warning("The GPU has too little memory to compare the gradients of the compiled model: not compared.")
            return
        if fault:
            raise UserError(
                f"{fault}. Training would be wrong, so nothing was trained. The compiler of PyTorch "
                f"{torch.__version__} is the likely cause: train with trainer.compile=false, or with another version "
                "(trainer.check_gradients=false skips this check)"
            )

    def _found_nonfinite(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Return 1 if the loss or gradient of any device is not finite, else 0, as a tensor on the device."""
        found = (~(torch.isfinite(loss) & torch.isfinite(gradient_norm))).float()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return found

    def pop_step_metrics(self) -> list[StepRecord]:
        """Return the metrics of each step since the last call; waits for the device."""
        values = torch.stack(self._pending_metrics)
        self._pending_metrics.clear()
        if self.trainer.world_size > 1:
            losses = values[:, 0].clone()
            torch.distributed.all_reduce(losses)
            values[:, 0] = losses
        first = self.steps_done - len(values) + 1
        return [
            StepRecord(first + index, loss, gradient_norm, applied=not found_nonfinite)
            for index, (loss, gradient_norm, found_nonfinite) in enumerate(values.tolist())
        ]

    def _gradients_stay_local(self, more_to_come: bool) -> contextlib.AbstractContextManager[None]:
        strategy = self.trainer.strategy
        if more_to_come and isinstance(strategy, ParallelStrategy):
            return strategy.block_backward_sync()
        return contextlib.nullcontext()

    def _clip_gradients(self) -> Tensor:
        limit = self.config.optimizer.clip_norm
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = full_tensor(torch.nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in parameters]))
        torch.nn.utils.clip_grads_with_norm_(parameters, float("inf") if limit is None else limit, norm)
        return norm

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the time: Lightning calls this after the hooks of all callbacks, and the next step waits for data."""
        self.other_hooks_done_at = time.perf_counter()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the windows of a batch, tensors [n, T], to `validation_metrics`."""
        micro_batches = list(batch.split(self.micro_batch_windows))
        if self.compile_model:  # another shape would be compiled again
            micro_batches = [micro_batch.padded(self.micro_batch_windows) for micro_batch in micro_batches]
        self._raise_document_limit(micro_batches)
        for micro_batch in micro_batches:
            self.validation_metrics.update(self.model, micro_batch, self.document_limit or None)

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """Return the log-probability of the targets of each document, [n, D] float64, without gradients."""
        windows = len(batch.input_ids)
        if self.compile_model:
            batch = batch.padded(self.micro_batch_windows)
        self._raise_document_limit([batch])
        return self.objective.reference_logprobs(self.model, batch, self.document_limit or None)[:windows]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the configuration, the step and the random state: plain data, readable with weights_only=True."""
        # Lightning's loop counters restart in the middle of hooks; the step holds all that they would.
        checkpoint.pop("loops", None)
        checkpoint["config"] = dataclasses.asdict(self.config)
        checkpoint["steps_done"] = self.steps_done
        checkpoint["fingerprints"] = data_of(self.trainer).fingerprints
        checkpoint["skipped_batches"] = list(data_module_of(self.trainer).skipped_batches)
        checkpoint["random_state"] = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
            "python": random.getstate(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the step and the random state."""
        self.steps_done = checkpoint["steps_done"]
        state = checkpoint["random_state"]
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"].cpu())
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
