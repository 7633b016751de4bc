"""Sharded parameters (FSDP2's ``DTensor``): their local part, and sums over all ranks.

``torch.distributed.tensor`` takes seconds to import, so nothing here imports it before a sharded tensor exists.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

from tethertune.errors import ConfigurationError

__all__ = ["full", "is_sharded", "local", "reduce_over_shards", "refuse_split_rows", "shard_like"]


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
        tensor: A tensor whose axis 0 is that of ``pattern``, whole or sharded.
        pattern: A whole or sharded tensor.
    """
    if not is_sharded(pattern):
        return full(tensor)
    if is_sharded(tensor):
        return tensor.redistribute(pattern.device_mesh, pattern.placements).to_local()
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(pattern.device_mesh.device_type)
    return distribute_tensor(tensor, pattern.device_mesh, pattern.placements, src_data_rank=None).to_local()


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
    split = [p for p in weight.placements if not (p.is_replicate() or (axis_0 and p.is_shard(0)))]
    if split:
        raise ConfigurationError(
            f"{name} is sharded as {split[0]}, which spreads its rows over ranks; the ball needs whole rows on a rank:"
            " shard axis 0 of layers whose rows are axis 0, replicate this one, or exclude it."
        )


def reduce_over_shards(values: Tensor, weights: Sequence[Tensor], operation: str = "sum") -> Tensor:
    """Combine each value over the ranks that hold a shard of its weight: one collective call for each mesh axis.

    Args:
        values: This rank's part, one a weight, (weights,).
        weights: The weights; the values of those that are not sharded stay as they are.
        operation: ``"sum"`` or ``"max"``.

    Returns:
        Of the shape of ``values``, equal on all ranks.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for i, weight in enumerate(weights):
        if is_sharded(weight):
            for axis, placement in enumerate(weight.placements):
                if placement.is_shard():
                    groups.setdefault((id(weight.device_mesh), axis), []).append(i)
    values = values.clone()
    for (_, axis), members in groups.items():
        first = weights[members[0]]
        assert is_sharded(first)
        packed = values[members]
        how = torch.distributed.ReduceOp.SUM if operation == "sum" else torch.distributed.ReduceOp.MAX
        torch.distributed.all_reduce(packed, how, group=first.device_mesh.get_group(axis))
        values[members] = packed
    return values
