"""The LightningModule: one optimizer step from the windows of one step.

    n  windows of this device in one step
    T  sequence_length

A Lightning batch is a whole step, not a micro-batch. So a step's count of targets is known before its first backward
pass, every Lightning interval is in steps, and accumulation needs no bookkeeping outside `training_step`.
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

from cucafera.config import Config, ModelConfig, UserError
from cucafera.data.windows import IGNORED, Batch, WindowDataModule
from cucafera.model.attention import document_limit
from cucafera.model.lora import add_adapters
from cucafera.model.transformer import Decoder
from cucafera.training.first_steps import FirstSteps
from cucafera.training.gradient_check import compiled_gradient_fault
from cucafera.training.hardware import Hardware
from cucafera.training.metrics import LanguageModelingMetrics
from cucafera.training.optimizers import build_optimizer, set_learning_rate
from cucafera.training.schedules import lr_ratio
from cucafera.training.sharding import FullySharded, whole

log = logging.getLogger(__name__)


def data_module_of(trainer: pl.Trainer) -> WindowDataModule[Any]:
    """The data module that a trainer fits with; Lightning's types do not know of it."""
    return cast(WindowDataModule[Any], trainer.datamodule)  # type: ignore[attr-defined]


class StepRecord(NamedTuple):
    """What is known of a step.

    Attributes:
        step: Which; the first is 1.
        loss: Mean over its targets, nats.
        gradient_norm: Before clipping.
        applied: Whether the weights were updated; not so if one of them is not finite.
    """

    step: int
    loss: float
    gradient_norm: float
    applied: bool


def build_decoder(config: ModelConfig, hardware: Hardware) -> Decoder:
    """A decoder to train, set up for a device.

    Raises:
        UserError: FlashAttention 3 or 4 is wanted and cannot be had.
    """
    attention = hardware.document_attention
    if attention in ("flash3", "flash4"):
        from cucafera.model.flash_attention import activate_successor

        activate_successor(attention, hardware.name, torch.cuda.get_device_capability())
        attention = "flash"
    residual_dtype = torch.bfloat16 if hardware.residual_precision == "bf16" else None
    return Decoder(config, hardware.activation_checkpointing, attention, residual_dtype)


class LanguageModel(pl.LightningModule):
    """Trains a Decoder. Its state dict is that of Hugging Face's LlamaForCausalLM with a tied head, and the adapters.

    Args:
        config: The run.
        hardware: The windows of one forward pass; whether the decoder is compiled, in place, when training begins; and
            whether it keeps its activations.
    """

    def __init__(self, config: Config, hardware: Hardware) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.micro_batch_windows = hardware.micro_batch_windows
        self.compile_model = hardware.compile
        self.document_limit = 0
        self.gradients_to_check = hardware.compile and config.trainer.check_gradients
        self.model = build_decoder(config.model, hardware)
        add_adapters(self.model, config.adapter)
        self.steps_done = 0
        self._unread: list[Tensor] = []
        self.other_hooks_done_at = time.perf_counter()

    def setup(self, stage: str) -> None:
        """Takes from the data module what validation needs to know of the tokenizer."""
        data = data_module_of(self.trainer)
        token_bytes = torch.zeros(self.config.model.vocab_size, dtype=torch.int64)
        token_bytes[: data.tokenizer.vocab_size] = torch.from_numpy(data.tokenizer.token_bytes())
        self.token_bytes = token_bytes.to(self.device)
        self.validation_metrics = LanguageModelingMetrics().to(self.device)
        if self.compile_model:
            # Under fsdp, whose hooks cannot be compiled, this comes to each block, all by one graph, and to the loss.
            # Shapes are the same at every step; what is compiled for any shape is slower.
            self.model.compile(dynamic=False)

    def configure_model(self) -> None:
        """Keeps this device's share of the weights, where each device is to have one."""
        if isinstance(self.trainer.strategy, FullySharded):
            self.trainer.strategy.shard(self.model)

    def whole_model(self) -> Decoder | None:
        """The decoder with all of its weights, in the first process; None in the others. Every process calls it."""
        is_first = self.trainer.is_global_zero
        if not isinstance(self.trainer.strategy, FullySharded):
            return self.model if is_first else None
        weights = {}
        for name, weight in self.model.state_dict().items():
            gathered = whole(weight)  # every process takes part
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
        """AdamW over the matrices and vectors that are trained."""
        return build_optimizer(self.model, self.config.optimizer)

    def learning_rate(self, step: int) -> float:
        """The peak times the schedule's ratio at a step."""
        return self.config.optimizer.lr * lr_ratio(step, self.config.schedule, self.config.horizon_steps)

    def on_train_start(self) -> None:
        """Tells Lightning, whose own loop state is not kept, how many steps the run has taken before."""
        self.first_steps = FirstSteps(self.model, self.steps_done)
        self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = self.steps_done
        self.other_hooks_done_at = time.perf_counter()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One optimizer step.

        The loss is the sum over all valid targets of the step, on all devices, over their count: it does not depend
        on how the windows are divided into micro-batches and devices.

        Args:
            batch: The windows of this device: tensors [n, T].
        """
        optimizer = cast(LightningOptimizer, self.optimizers())
        set_learning_rate(optimizer.optimizer, self.learning_rate(self.steps_done))

        targets_in_step = (batch.targets != IGNORED).sum()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(targets_in_step)
        micro_batches = list(batch.split(self.micro_batch_windows))
        self._raise_document_limit(micro_batches)
        if self.gradients_to_check:
            self._check_gradients(micro_batches[0])
        loss = torch.zeros((), device=self.device)
        for index, micro_batch in enumerate(micro_batches):
            with self._gradients_stay_local(index < len(micro_batches) - 1):
                share = self._loss(micro_batch) / targets_in_step
                # Gradients are averaged over devices; the loss is a sum over them.
                self.manual_backward(share * self.trainer.world_size)
            loss += share.detach()

        if not self.first_steps.has_seen_enough:
            self.first_steps.watch(self.learning_rate(self.steps_done))
        gradient_norm = self._clip_gradients()
        broken = self._is_broken(loss, gradient_norm)
        # Where this is 1, the fused kernel leaves weights and moments as they are; the device is not waited for.
        optimizer.optimizer.found_inf = broken  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        self._unread.append(torch.stack([loss, gradient_norm, broken]))

    def _loss(self, micro_batch: Batch) -> Tensor:
        limit = self.document_limit or None
        loss: Tensor = self.model(
            micro_batch.input_ids, micro_batch.targets, micro_batch.documents, document_limit=limit
        )
        return loss

    def _raise_document_limit(self, micro_batches: Sequence[Batch]) -> None:
        """Makes room for the documents of micro-batches, for flash attention."""
        if self.model.document_attention == "flash":
            most = max(sum(micro_batch.document_counts or ()) for micro_batch in micro_batches)
            self.document_limit = document_limit(most, self.document_limit)

    def _check_gradients(self, micro_batch: Batch) -> None:
        """Compares the gradients of the compiled model with those of the written one, once. Raises UserError.

        A micro-batch without any target says nothing: the next step is asked.
        """
        self.gradients_to_check = not bool((micro_batch.targets != IGNORED).any())
        if self.gradients_to_check:
            return
        if isinstance(self.trainer.strategy, FullySharded):
            return  # its gradients are there only after a whole backward pass; each block is compiled by itself
        try:
            fault = compiled_gradient_fault(self.model, micro_batch, self.document_limit or None)
        except torch.OutOfMemoryError:
            log.warning("The GPU has too little memory to compare the gradients of the compiled model: not compared.")
            return
        if fault:
            raise UserError(
                f"{fault}. Training would be wrong, so nothing was trained. The compiler of PyTorch "
                f"{torch.__version__} is the likely cause: train with trainer.compile=false, or with another version "
                "(trainer.check_gradients=false trains all the same)"
            )

    def _is_broken(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """1 if the loss or gradient of any device is not finite, else 0."""
        broken = (~(torch.isfinite(loss) & torch.isfinite(gradient_norm))).float()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(broken, torch.distributed.ReduceOp.MAX)
        return broken

    def read_steps(self) -> list[StepRecord]:
        """Loss and gradient norm of each step since the last time; waits for the device."""
        values = torch.stack(self._unread)
        self._unread.clear()
        if self.trainer.world_size > 1:
            losses = values[:, 0].clone()
            torch.distributed.all_reduce(losses)
            values[:, 0] = losses
        first = self.steps_done - len(values) + 1
        return [
            StepRecord(first + index, loss, gradient_norm, applied=not broken)
            for index, (loss, gradient_norm, broken) in enumerate(values.tolist())
        ]

    def _gradients_stay_local(self, more_to_come: bool) -> contextlib.AbstractContextManager[None]:
        strategy = self.trainer.strategy
        if more_to_come and isinstance(strategy, ParallelStrategy):
            return strategy.block_backward_sync()
        return contextlib.nullcontext()

    def _clip_gradients(self) -> Tensor:
        limit = self.config.optimizer.clip_norm
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in parameters]))
        torch.nn.utils.clip_grads_with_norm_(parameters, float("inf") if limit is None else limit, norm)
        return norm

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Runs after the hooks of all callbacks: what passes from here to the next step is waiting for data."""
        self.other_hooks_done_at = time.perf_counter()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds the windows of a batch, tensors [n, T], to `validation_metrics`."""
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        micro_batches = list(batch.split(self.micro_batch_windows))
        if self.compile_model:  # another shape would be compiled again
            micro_batches = [micro_batch.padded(self.micro_batch_windows) for micro_batch in micro_batches]
        self._raise_document_limit(micro_batches)
        for micro_batch in micro_batches:
            scores = self.model.scores(
                micro_batch.input_ids, micro_batch.targets, micro_batch.documents, self.document_limit or None
            )
            nats += scores[0]
            correct += scores[1]
        valid = batch.targets != IGNORED
        text_bytes = self.token_bytes[batch.targets.clamp_min(0)] * valid
        self.validation_metrics.update(nats, correct, valid.sum(), text_bytes.sum())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the configuration, the step and the random state: plain data, readable with weights_only=True."""
        # Lightning's loop counters restart in the middle of hooks; the step says all that they would.
        checkpoint.pop("loops", None)
        checkpoint["config"] = dataclasses.asdict(self.config)
        checkpoint["steps_done"] = self.steps_done
        checkpoint["identity"] = data_module_of(self.trainer).identity
        checkpoint["left_out_batches"] = list(data_module_of(self.trainer).left_out_batches)
        checkpoint["random_state"] = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
            "python": random.getstate(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the step and the random state back."""
        self.steps_done = checkpoint["steps_done"]
        state = checkpoint["random_state"]
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"].cpu())
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
