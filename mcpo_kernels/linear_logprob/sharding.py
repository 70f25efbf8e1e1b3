"""Which rows of the head a rank holds, from what the caller has: a process group, a DTensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


class Slab(NamedTuple):
    """The rows of the head that this rank computes with."""

    weight_VD: Tensor
    bias_V: Tensor | None
    group_name: str | None
    """Of the ranks that hold the other rows; None where these are all."""
    num_ranks: int


def local_slab(weight: Tensor, bias: Tensor | None, group: ProcessGroup | DeviceMesh) -> Slab:
    """What this rank holds of a head that is sharded by rows over ``group``, in order of ranks.

    Plain tensors are taken for the slab of this rank. Gradients of the slab of a DTensor are
    DTensors of its placement.

    Raises:
        TypeError: ``group`` is neither a process group nor a mesh.
        ValueError: the mesh has several dimensions, this process is not in the group, or a DTensor
            is placed in another way than ``Shard(0)`` or ``Replicate()`` over the same ranks.
    """
    process_group = _process_group(group)
    whole = _is_whole("weight", weight, process_group)
    if bias is not None and _is_whole("bias", bias, process_group) != whole:
        raise ValueError(
            "weight and bias must be sharded alike, got one that is whole on every rank and one "
            "that is not; distribute both with Shard(0)"
        )
    if whole:
        return Slab(_local(weight), None if bias is None else _local(bias), None, 1)
    size = dist.get_world_size(process_group)
    bias_V = None if bias is None else _local(bias)
    return Slab(_local(weight), bias_V, process_group.group_name, size)


def _process_group(group: Any) -> ProcessGroup:
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "this process must be in group, got a group of others; call this on its ranks alone"
        )
    if isinstance(group, dist.ProcessGroup):
        return group
    if not isinstance(group, DeviceMesh):
        raise TypeError(
            "group must be a torch.distributed ProcessGroup or DeviceMesh, got "
            f"{type(group).__name__}; torch.distributed.group.WORLD is that of all processes"
        )
    if group.ndim != 1:
        raise ValueError(
            f"group must be a mesh of one dimension, got {group.ndim}; name the one that shards "
            "the head, e.g. mesh['tp']"
        )
    return group.get_group()


def _is_whole(name: str, tensor: Any, group: ProcessGroup) -> bool:
    """Whether every rank holds all of it, which of sharded tensors a DTensor alone can say."""
    if not hasattr(tensor, "placements"):
        return False
    mesh, placements = tensor.device_mesh, tensor.placements
    ranks = dist.get_process_group_ranks(group)
    if mesh.ndim != 1 or _ranks_of(mesh) != ranks:
        raise ValueError(
            f"{name} must be distributed over the ranks of group in their order, got the mesh "
            f"{_ranks_of(mesh)} and the ranks {ranks}; pass group=weight.device_mesh where that "
            "is the mesh of tensor parallelism"
        )
    (placement,) = placements
    # No subclass: FSDP's strided shards hold other rows.
    from torch.distributed.tensor import Replicate, Shard

    if type(placement) is Replicate:
        return True
    if type(placement) is Shard and placement.dim == 0:
        return False
    raise ValueError(
        f"{name} must be placed as Shard(0), by rows of the vocabulary, or Replicate(), got "
        f"{placement}; redistribute it, e.g. {name}.redistribute(placements=[Shard(0)])"
    )


def _ranks_of(mesh: DeviceMesh) -> list[int]:
    return mesh.mesh.tolist()


# To torch.compile the tensor in a mesh is one whose numbers it does not know. This is what
# torch.compiler.assume_constant_result does, which would import the whole compiler, and Triton.
_ranks_of._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "placements") else tensor
