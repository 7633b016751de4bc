"""Batch norm on several processes: the statistics of the whole batch, as one process would see it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["WholeBatch", "batch_norm"]


class WholeBatch(TorchFunctionMode):
    """Inside, every batch norm in training mode normalises by the images of all processes together.

    It stands in for :func:`torch.nn.functional.batch_norm` itself, whatever module calls it.

    Args:
        counts: Whether the images of this process count; one whose share of a batch is empty takes part all the same.
    """

    def __init__(self, *, counts: bool) -> None:
        super().__init__()
        self._counts = counts

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace batch norm in training mode; leave all else."""
        given = dict(kwargs or {})
        if func is functional.batch_norm and given.pop("training", False):
            return batch_norm(*args, counts=self._counts, **given)
        return func(*args, **(kwargs or {}))


def batch_norm(
    images: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    counts: bool = True,
) -> Tensor:
    """As :func:`torch.nn.functional.batch_norm` in training mode on the batches of all processes as one.

    Args:
        images: (b, channels, ...), this process's part.
        running_mean: (channels,), moved towards the mean of the whole batch; or None.
        running_var: (channels,), moved towards its unbiased variance; or None.
        weight: (channels,) scale, or None.
        bias: (channels,) shift, or None.
        momentum: How far the running statistics are moved.
        eps: Added to the variance.
        counts: Whether this part counts in the statistics.
    """
    values = images.float()
    across = [0, *range(2, values.dim())]
    shape = [1, -1, *[1] * (values.dim() - 2)]
    part = values.new_tensor([values.numel() / values.shape[1] if counts else 0.0])
    *sums, size = _Sum.apply(torch.cat([part * values.mean(across), part])).split([values.shape[1], 1])
    mean = sums[0] / size
    centred = values - mean.view(shape)
    variance = _Sum.apply(part * centred.square().mean(across)) / size
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(variance * (size / (size - 1)), momentum)
    scale = (variance + eps).rsqrt() if weight is None else (variance + eps).rsqrt() * weight
    normal = centred * scale.view(shape)
    shifted: Tensor = normal if bias is None else normal + bias.view(shape)
    return shifted.to(images.dtype)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes, and of its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Sum the tensor."""
        del ctx
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Sum the gradient."""
        del ctx
        total = gradient.clone()
        distributed.all_reduce(total)
        return total
