"""Sharded parameters (FSDP2's ``DTensor``): their local part, and sums over all ranks.

``torch.distributed.tensor`` takes seconds to import, so nothing here imports it before a sharded tensor exists.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

from tethertune.errors import ConfigurationError

__all__ = [
    "axes_of_shards",
    "from_part",
    "full",
    "is_sharded",
    "local",
    "reduce_over_shards",
    "refuse_split_rows",
    "shard_like",
    "sharded_alike",
]


def is_sharded(tensor: Tensor) -> "TypeIs[DTensor]":
    """Whether the tensor is a ``DTensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank stores; the tensor itself when it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all ranks when it is sharded (a collective call)."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """The part of a tensor (every rank holds all of it, or it is sharded already) that belongs beside ``pattern``'s.

    Args:
        tensor: A tensor whose axis 0 is that of ``pattern``, whole or sharded. Of a whole one the part is a view, and
            nothing is sent (only shards of shards along one axis, FSDP2 over tensor parallelism, are copied).
        pattern: A whole or sharded tensor.
    """
    if not is_sharded(pattern):
        return full(tensor)
    if is_sharded(tensor):
        return tensor.redistribute(pattern.device_mesh, pattern.placements).to_local()
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if not all(isinstance(p, Replicate | Shard) for p in pattern.placements):
        return distribute_tensor(
            tensor.to(pattern.device_mesh.device_type), pattern.device_mesh, pattern.placements, src_data_rank=None
        ).to_local()
    for axis, placement in enumerate(pattern.placements):
        if isinstance(placement, Shard):
            parts = tensor.chunk(pattern.device_mesh.size(axis), placement.dim)
            mine = pattern.device_mesh.get_local_rank(axis)
            tensor = parts[mine] if mine < len(parts) else tensor.narrow(placement.dim, 0, 0)
    return tensor


def from_part(part: Tensor, pattern: Tensor) -> Tensor:
    """The tensor, sharded as ``pattern``, of which each rank has given its part; the part itself if that is whole."""
    if not is_sharded(pattern):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        pattern.device_mesh,
        pattern.placements,
        run_check=False,
        shape=pattern.shape,
        stride=pattern.stride(),
    )


def sharded_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are both whole, or shared out among the same ranks in the same way."""
    if is_sharded(a) and is_sharded(b):
        return a.device_mesh == b.device_mesh and a.placements == b.placements
    return is_sharded(a) == is_sharded(b)


def axes_of_shards(tensor: "DTensor") -> list[int | None]:
    """For each axis of the mesh, the axis of the tensor that is shared out along it; ``None`` for copies."""
    return [getattr(placement, "dim", None) for placement in tensor.placements]  # is_shard() misses shards of shards


def refuse_split_rows(weight: Tensor, name: str, *, axis_0: bool) -> None:
    """Check that every row of a sharded weight lies on one rank.

    Args:
        weight: The weight, sharded or not.
        name: Its name, for the message.
        axis_0: Whether its rows are numbered by axis 0.

    Raises:
        ConfigurationError: A row is spread over ranks, so that its norm is on none of them.
    """
    if not is_sharded(weight):
        return
    axes = axes_of_shards(weight)
    split = [p for p, axis in zip(weight.placements, axes, strict=True) if axis is not None and (axis or not axis_0)]
    if split:
        raise ConfigurationError(
            f"{name} is sharded as {split[0]}, which spreads its rows over ranks; the ball needs whole rows on a rank:"
            " shard axis 0 of layers whose rows are axis 0, replicate this one, or exclude it."
        )


def reduce_over_shards(values: Sequence[Tensor], weights: Sequence[Tensor], operation: str = "sum") -> list[Tensor]:
    """Combine each value over the ranks that hold a shard of its weight: one collective call for each mesh axis.

    Args:
        values: This rank's part, one a weight, all of one shape, each on its weight's device.
        weights: The weights; the values of those that are not sharded stay as they are.
        operation: ``"sum"`` or ``"max"``.

    Returns:
        The combined values, equal on all ranks.
    """
    groups: dict[tuple[DeviceMesh, int], list[int]] = {}
    for i, weight in enumerate(weights):
        if is_sharded(weight):
            for axis, shared_out in enumerate(axes_of_shards(weight)):
                if shared_out is not None:
                    groups.setdefault((weight.device_mesh, axis), []).append(i)
    result = list(values)
    for (mesh, axis), members in groups.items():
        packed = torch.stack([result[i] for i in members])
        how = torch.distributed.ReduceOp.SUM if operation == "sum" else torch.distributed.ReduceOp.MAX
        torch.distributed.all_reduce(packed, how, group=mesh.get_group(axis))
        for i, value in zip(members, packed, strict=True):
            result[i] = value
    return result
