"""Fully sharded data parallelism (FSDP2): of each weight, gradient and moment, every device holds a share.

A layer's weights are whole on a device only while it computes with them. What leaves the devices is whole: checkpoints
are those of a run on one device.
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
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from cucafera.model.transformer import Decoder

BF16_BLOCKS = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
"""Beside autocast: a block's weights travel in bf16, and its gradients in fp32. Its inputs stay as they are: residual
stream and angles of the rotary embedding are in fp32, as on one device."""


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each device holds a share; every process of the job calls it. Others are as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with the files of every other strategy: whole, and by way of the CheckpointIO.

    Args:
        world_size: Devices of the job.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__(data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def shard(self, model: Decoder) -> None:
        """Leaves each device its share of a decoder that is the same on all of them.

        Embedding, which is the head too, and final norm are one unit, and stay in fp32; each block is another.
        """
        mesh = self.device_mesh["data_parallel"]
        blocks = BF16_BLOCKS if self.precision_plugin.precision == "bf16-mixed" else MixedPrecisionPolicy()
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=blocks)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "scores")
        if self.root_device.type == "cpu":
            for part in _sharded_parts(model):
                part.set_force_sum_reduction_for_comms(True)  # the gloo of older PyTorch knows no mean

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Within it, gradients are added up on their device, whole, and not yet over the devices."""
        assert self.model is not None
        parts = _sharded_parts(self.model)
        for part in parts:
            part.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for part in parts:
                part.set_requires_gradient_sync(True, recurse=False)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state with whole tensors in main memory, in the first process; in others without tensors."""
        state = ParallelStrategy.optimizer_state(self, optimizer)

        def gathered(tensor: Tensor) -> Tensor | None:
            tensor = whole(tensor)  # every process takes part
            return tensor.cpu() if self.is_global_zero else None

        return _with_each_tensor(state, gathered)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning loads the optimizer by the method below."""
        return True

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """As every other strategy: the first process writes."""
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """As every other strategy: each process has the whole of it."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Takes its share of each weight."""
        shares = {name: self._share_of(weight) for name, weight in checkpoint["state_dict"].items()}
        ParallelStrategy.load_model_state_dict(self, {"state_dict": shares}, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes its share of each moment."""
        shares = [_with_each_tensor(state, self._share_of) for state in checkpoint["optimizer_states"]]
        ParallelStrategy.load_optimizer_state_dict(self, {"optimizer_states": shares})

    def _share_of(self, tensor: Tensor) -> Tensor:
        if not tensor.ndim:  # the optimizer's count of steps
            return tensor
        share = distribute_tensor(tensor, self.device_mesh["data_parallel"], [Shard(0)], src_data_rank=None)
        return share.clone()  # or it would keep all of the tensor in memory


def _sharded_parts(model: torch.nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _with_each_tensor(state: dict[str, Any], change: Callable[[Tensor], Tensor | None]) -> dict[str, Any]:
    """The state of an optimizer, with what a function makes of each of its tensors."""
    changed = {
        index: {name: change(tensor) for name, tensor in moments.items()} for index, moments in state["state"].items()
    }
    return {**state, "state": changed}
