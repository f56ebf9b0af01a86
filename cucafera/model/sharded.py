"""Tensors that may be sharded over processes, as FSDP2 does with weights and their state."""

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor, in a collective that every process calls; return any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process has: all of it unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Shard a tensor that every process has, without a collective."""
    # With src_data_rank=None each process slices its own copy; otherwise the first would send its own to all.
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
