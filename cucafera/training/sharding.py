"""Fully sharded data parallelism (FSDP2): each device holds a shard of every weight, gradient and moment.

The weights of a block are gathered on a device only while it computes with them (Zhao et al., 2023). Checkpoints hold
full tensors, gathered in the first process, so that they are the same as those of a run on one device.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard

from cucafera.model.sharded import full_tensor, sharded
from cucafera.model.transformer import Decoder

BF16_BLOCKS = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
"""In addition to autocast: the weights of a block are gathered in bf16, and its gradients are reduced in fp32. Its
inputs are not cast: residual stream and rotary tables keep their precision, as on one device."""


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with the checkpoints of every other strategy: full tensors, through CheckpointIO.

    Args:
        world_size: Devices of the job.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__(data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def shard(self, model: Decoder) -> None:
        """Shard a decoder that has the same weights on every device.

        Each block is one unit. The rest, the tied embedding and the final norm, is another, which stays in fp32.
        """
        mesh = self.device_mesh["data_parallel"]
        policy = BF16_BLOCKS if self.precision_plugin.precision == "bf16-mixed" else MixedPrecisionPolicy()
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
        # FSDP2 gathers weights in the hooks of `forward`; validation and preferences enter the model by other methods.
        for method in ("loss_and_accuracy", "target_logprobs"):
            register_fsdp_forward_method(model, method)
        if self.root_device.type == "cpu":
            for unit in _units(model):
                unit.set_force_sum_reduction_for_comms(True)  # gloo has no mean in older PyTorch

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulate unsharded gradients locally within the context, without a reduction over devices.

        Gradient accumulation needs one reduction per step, not per micro-batch. The cost is memory: each device holds
        full gradients until then (see `memory.StepMemory`).
        """
        assert self.model is not None
        units = _units(self.model)
        for unit in units:
            unit.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_requires_gradient_sync(True, recurse=False)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the state with full tensors in main memory in the first process; in others without tensors."""
        state = ParallelStrategy.optimizer_state(self, optimizer)

        def gathered(tensor: Tensor) -> Tensor | None:
            tensor = full_tensor(tensor)  # a collective
            return tensor.cpu() if self.is_global_zero else None

        return _with_each_tensor(state, gathered)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: Lightning calls `load_optimizer_state_dict` below."""
        return True

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Save as every other strategy: the first process writes."""
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load as every other strategy: each process gets the full checkpoint."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this device's shard of each weight."""
        shards = {name: self._shard_of(weight) for name, weight in checkpoint["state_dict"].items()}
        ParallelStrategy.load_model_state_dict(self, {"state_dict": shards}, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this device's shard of each moment."""
        shards = [_with_each_tensor(state, self._shard_of) for state in checkpoint["optimizer_states"]]
        ParallelStrategy.load_optimizer_state_dict(self, {"optimizer_states": shards})

    def _shard_of(self, tensor: Tensor) -> Tensor:
        if not tensor.ndim:  # the step count of the optimizer
            return tensor
        shard = sharded(tensor, self.device_mesh["data_parallel"], [Shard(0)])  # every process has read the checkpoint
        return shard.clone()  # a slice would keep the full tensor in memory


def _units(model: torch.nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _with_each_tensor(state: dict[str, Any], change: Callable[[Tensor], Tensor | None]) -> dict[str, Any]:
    """Return the state of an optimizer with a function applied to each of its tensors."""
    changed = {
        index: {name: change(tensor) for name, tensor in moments.items()} for index, moments in state["state"].items()
    }
    return {**state, "state": changed}
