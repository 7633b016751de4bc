"""Norms of the linear map that a layer applies to an input of a given size.

The paper's bounds are about the matrix of each layer, which for a convolution depends on the size of the input. These
are that matrix's norms, exactly, found from the kernel and a count of how often each of its taps is used.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from tethertune.errors import ConfigurationError
from tethertune.theory.maps import Convolution, Dense, Diagonal, Effort, LinearMap, OperatorNorms, Separable
from tethertune.theory.taps import Axis

__all__ = ["OperatorNorms", "along_rows", "batch_norm_scale", "fold", "operator_norms", "pooling"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)


def operator_norms(
    module: nn.Module, input_size: Sequence[int], *, weight: Tensor | None = None, spectral: Effort = "best"
) -> OperatorNorms:
    """Norms of the matrix that a layer applies, biases aside, in float64.

    Args:
        module: Linear, Conv1d, Conv2d (any padding, stride, dilation and groups; timm's ``Conv2dSame``),
            ConvTranspose1d/2d, average pooling (timm's ``AvgPool2dSame``), batch norm in eval mode, or
            ``nn.Sequential(convolution, batch_norm)`` for the two folded into one.
        input_size: Size of one input without the batch: (C, H, W), (C, L) for one dimension, (..., features) for
            Linear.
        weight: Measure this weight in the layer's place, of the layer's weight's shape: ``W - W0`` gives the norms of
            the displacement. For batch norm it is the factor of each channel.
        spectral: ``"best"``, ``"fast"`` (a cheaper upper bound), or ``"estimate"`` (power iteration).

    Raises:
        ConfigurationError: A layer that is not listed, batch norm in training mode, or a size that does not fit.

    Example:
        >>> layer = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
        >>> _ = torch.nn.init.ones_(layer.weight)
        >>> norms = operator_norms(layer, (1, 4, 4))
        >>> norms.mars, norms.frobenius, norms.one
        (9.0, 10.0, 9.0)
    """
    geometry, own = _linear_map(module, tuple(input_size))
    if weight is None:
        weight = own
    elif weight.shape != own.shape:
        raise ConfigurationError(
            f"weight of shape {tuple(weight.shape)} given for {_name(module)}: it must be {tuple(own.shape)}."
        )
    return geometry.norms(weight.detach(), spectral)


def batch_norm_scale(weight: Tensor | None, variance: Tensor, eps: float) -> Tensor:
    """The factor of each channel that batch norm in eval mode multiplies by, float64."""
    scale = (variance.double() + eps).rsqrt()
    return scale if weight is None else scale * weight.double()


def fold(convolution: nn.modules.conv._ConvNd, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution followed by batch norm in eval mode, as one layer, float64.

    ``K'[o] = s[o] K[o]`` and ``b' = s (b - mean) + beta`` with ``s = weight / sqrt(var + eps)``.
    """
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None or norm.running_mean is None:
        raise ConfigurationError(f"{_name(norm)} cannot be folded into a convolution: only batch norm with statistics.")
    _refuse_training(norm)
    _refuse_other(norm, *_NORMS)
    scale = batch_norm_scale(norm.weight, norm.running_var, norm.eps).detach()
    weight, bias = convolution.weight, convolution.bias
    shift = -norm.running_mean.double() if bias is None else bias.detach().double() - norm.running_mean.double()
    beta = 0.0 if norm.bias is None else norm.bias.detach().double()
    factors = along_rows(scale, weight, convolution.groups if isinstance(convolution, _TRANSPOSED) else None)
    return weight.detach().double() * factors, scale * shift + beta


def along_rows(scale: Tensor, weight: Tensor, transposed_groups: int | None = None) -> Tensor:
    """A factor for each output channel, shaped to multiply a weight.

    Args:
        scale: (out,).
        weight: (out, ...), or (in, out / groups, ...) of a transposed convolution.
        transposed_groups: The groups of a transposed convolution; ``None`` for any other layer.
    """
    if transposed_groups is None:
        return scale.view(-1, *[1] * (weight.ndim - 1))
    by_input = scale.view(transposed_groups, 1, -1).expand(-1, weight.shape[0] // transposed_groups, -1)
    return by_input.reshape(weight.shape[0], -1, *[1] * (weight.ndim - 2))


def _linear_map(module: nn.Module, size: tuple[int, ...]) -> tuple[LinearMap, Tensor]:
    """The geometry of a layer at an input size, and its own weight."""
    if isinstance(module, nn.Sequential) and len(module) == 2:
        first, second = module
        if isinstance(first, _CONVOLUTIONS + _TRANSPOSED):
            return _convolution(first, size), fold(first, second)[0]
    if isinstance(module, nn.Linear):
        _refuse_other(module, nn.Linear)
        _refuse(size[-1:] != (module.in_features,), module, size, f"(..., {module.in_features})")
        return Dense(torch.Size(size[:-1]).numel()), module.weight
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        _refuse_training(module)
        _refuse_other(module, *_NORMS)
        if module.running_var is None:
            raise ConfigurationError("This batch norm keeps no running statistics, so it is not a linear map.")
        _refuse(size[:1] != (module.num_features,), module, size, f"({module.num_features}, ...)")
        return Diagonal(torch.Size(size[1:]).numel()), batch_norm_scale(module.weight, module.running_var, module.eps)
    if isinstance(module, _CONVOLUTIONS + _TRANSPOSED):
        return _convolution(module, size), module.weight
    if isinstance(module, _AVERAGES):
        return _average(module, size), torch.ones((), dtype=torch.float64)
    raise ConfigurationError(
        f"{_name(module)} is not a layer whose linear map is known: use Linear, Conv1d/2d, ConvTranspose1d/2d, average"
        " pooling, batch norm, or nn.Sequential(convolution, batch_norm)."
    )


def _convolution(module: nn.Module, size: tuple[int, ...]) -> Convolution:
    assert isinstance(module, _CONVOLUTIONS + _TRANSPOSED)
    same = _is_timm(module, "Conv2dSame")
    if not same:
        _refuse_other(module, *_CONVOLUTIONS, *_TRANSPOSED)
    dims = len(module.kernel_size)
    fits = len(size) == dims + 1 and size[0] == module.in_channels and min(size) > 0
    _refuse(not fits, module, size, f"({module.in_channels}, {', '.join('HW'[:dims])})")
    lengths, kernel = size[1:], module.kernel_size
    axes = []
    for d in range(dims):
        step = (module.stride[d], module.dilation[d])
        if isinstance(module, _TRANSPOSED):
            axes.append(transposed_axis(lengths[d], kernel[d], *step, int(module.padding[d]), module.output_padding[d]))
        else:
            before, after = _same(lengths[d], kernel[d], *step) if same else _pads(module, d)
            axes.append(Axis(lengths[d], kernel[d], *step, before, after, module.padding_mode))
    _refuse(any(axis.outputs < 1 for axis in axes), module, size, "a map that the kernel fits into")
    if dims == 1:
        axes.insert(0, Axis(1, 1))
    return Convolution(axes[0], axes[1], module.groups, isinstance(module, _TRANSPOSED))


def transposed_axis(length: int, kernel: int, stride: int, dilation: int, padding: int, output_padding: int) -> Axis:
    """The axis of the convolution that a transposed convolution of an input of this length transposes."""
    outputs = (length - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1
    # ``after`` is what makes that convolution give exactly ``length`` outputs.
    after = (length - 1) * stride + dilation * (kernel - 1) + 1 - outputs - padding
    return Axis(outputs, kernel, stride, dilation, padding, after)


def _pads(module: nn.Module, dim: int) -> tuple[int, int]:
    assert isinstance(module, _CONVOLUTIONS)
    if isinstance(module.padding, str):
        total = 0 if module.padding == "valid" else module.dilation[dim] * (module.kernel_size[dim] - 1)
        return total // 2, total - total // 2
    return int(module.padding[dim]), int(module.padding[dim])


def _same(length: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """TensorFlow's "same" padding, as timm's ``pad_same``."""
    total = max((-(-length // stride) - 1) * stride + (kernel - 1) * dilation + 1 - length, 0)
    return total // 2, total - total // 2


def _average(module: nn.Module, size: tuple[int, ...]) -> Separable:
    flat = isinstance(module, (nn.AvgPool1d, nn.AdaptiveAvgPool1d))
    _refuse(len(size) != (2 if flat else 3), module, size, "(C, L)" if flat else "(C, H, W)")
    lengths = ((1, size[1]) if flat else size[1:]) if size else ()
    if isinstance(module, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)):
        wanted = module.output_size if isinstance(module.output_size, tuple) else (module.output_size,) * 2
        wanted = (1, wanted[-1]) if flat else wanted
        targets = [length if w is None else int(w) for w, length in zip(wanted, lengths, strict=True)]
        matrices = [adaptive_matrix(length, w) for length, w in zip(lengths, targets, strict=True)]
        return Separable(matrices[0], matrices[1], size[0])
    assert isinstance(module, (nn.AvgPool1d, nn.AvgPool2d))
    if not _is_timm(module, "AvgPool2dSame"):
        _refuse_other(module, *_AVERAGES)
    kernel, stride, padding = (_pair(v) for v in (module.kernel_size, module.stride, module.padding))
    if flat:
        kernel, stride, padding = (1, kernel[1]), (1, stride[1]), (0, padding[1])
    pads = [_same(n, k, s) for n, k, s in zip(lengths, kernel, stride, strict=True)]
    if not _is_timm(module, "AvgPool2dSame"):
        pads = [(0, 0), (0, 0)]
    return pooling(
        size[0],
        lengths,
        kernel,
        stride,
        padding,
        ceil_mode=module.ceil_mode,
        count_include_pad=module.count_include_pad,
        divisor=getattr(module, "divisor_override", None),
        zeros=pads,
    )


def pooling(
    channels: int,
    lengths: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
    zeros: Sequence[tuple[int, int]] = ((0, 0), (0, 0)),
) -> Separable:
    """The map of an average pooling of (channels, *lengths), with extra ``zeros`` put around the input before it."""
    matrices = []
    for d in range(2):
        before, after = zeros[d]
        basis = functional.pad(torch.eye(lengths[d], dtype=torch.float64).unsqueeze(1), (before, after))
        pooled = functional.avg_pool1d(basis, kernel[d], stride[d], padding[d], ceil_mode, count_include_pad)
        matrix = pooled.squeeze(1).T
        if divisor is not None:
            matrix = (matrix != 0).double()
        matrices.append(matrix)
    if divisor is not None:
        matrices[0] = matrices[0] / divisor
    return Separable(matrices[0], matrices[1], channels)


def adaptive_matrix(length: int, outputs: int) -> Tensor:
    """The matrix of adaptive average pooling along one axis, (outputs, length), float64."""
    return functional.adaptive_avg_pool1d(torch.eye(length, dtype=torch.float64).unsqueeze(1), outputs).squeeze(1).T


def _pair(value: "int | tuple[int, ...]") -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return value[0], value[-1]


def _is_timm(module: nn.Module, name: str) -> bool:
    return any(t.__name__ == name and t.__module__.startswith("timm.") for t in type(module).__mro__)


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _refuse(wrong: bool, module: nn.Module, size: tuple[int, ...], wanted: str) -> None:
    if wrong:
        raise ConfigurationError(f"input_size={size} does not fit {_name(module)}: it must be {wanted}.")


def _refuse_other(module: nn.Module, *known: type[nn.Module]) -> None:
    """Refuse a subclass that computes something else; of timm's batch norm with an activation it is the linear part."""
    if not any(type(module).forward is kind.forward for kind in known) and not _is_timm(module, "BatchNormAct2d"):
        raise ConfigurationError(f"{_name(module)} changes what its base class computes: its linear map is not known.")


def _refuse_training(module: nn.Module) -> None:
    if module.training:
        raise ConfigurationError(
            f"{_name(module)} is in training mode, where it is not a linear map: call model.eval() first."
        )
