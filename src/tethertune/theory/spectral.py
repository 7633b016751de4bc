"""The spectral norm of a convolution: exact where that is feasible, else a proven upper bound.

* A small matrix, or a kernel of one tap without padding: singular values of the matrix itself.
* Circular padding with a stride that divides the map: the map is block diagonal in the Fourier basis, one block a
  frequency of the output, made of the stride's aliases side by side (Sedghi et al. 2019; the polyphase form for
  strides). Exact.
* Zero padding: the map is a submatrix of the circular one on a grid with room for the padding, so the latter's norm is
  an upper bound. Any other padding: such a map on the padded input, times the l2 norm of the padding.
* Fast: a block of the Fourier form is the kernel, as a matrix of blocks, between two isometries times the root of the
  number of taps; so ``sqrt(kh kw)`` times the spectral norm of any of the kernel's four unfoldings is an upper bound
  (Singla and Feizi 2021), for every stride and dilation.
* Power iteration converges from below: never a bound.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tethertune.theory.taps import Axis

__all__ = ["SMALL", "convolution", "dense"]

SMALL = 512
"""Matrices with at most this many rows or columns are decomposed exactly."""
_ENTRIES = 1 << 22
_CHUNK = 1 << 21
_POWER_STEPS = 100

Found = tuple[float, Literal["exact", "upper", "estimate"]]


def dense(matrices: Tensor, effort: str = "best") -> float:
    """Largest singular value of a batch of matrices (batch, rows, columns).

    Found from the eigenvalues of the smaller Gram matrix, which loses nothing at the top of the spectrum.
    """
    if effort == "estimate":
        return max(_power(matrix.__matmul__, matrix[0]) for matrix in matrices)
    scale = matrices.abs().amax()
    if scale == 0:
        return 0.0
    matrices = matrices / scale
    wide = matrices.shape[-2] <= matrices.shape[-1]
    gram = matrices @ matrices.mH if wide else matrices.mH @ matrices
    if gram.shape[-1] == 1:
        return float(scale * gram.real.amax().sqrt())
    return float(scale * torch.linalg.eigvalsh(gram)[..., -1].amax().clamp_min(0).sqrt())


def convolution(weight: Tensor, vertical: Axis, horizontal: Axis, groups: int, effort: str) -> Found:
    """Spectral norm of a convolution.

    Args:
        weight: (out, in / groups, kh, kw), float64.
        vertical: The geometry along the height.
        horizontal: The geometry along the width.
        groups: Number of groups; the map is block diagonal, so the largest block counts.
        effort: ``best``, ``fast`` or ``estimate``.

    Returns:
        The value and what it is: ``exact``, ``upper`` or ``estimate``.
    """
    kernels = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    if effort == "estimate":
        return _estimate(weight, vertical, horizontal, groups), "estimate"
    axes = (vertical, horizontal)
    rows = kernels.shape[1] * vertical.outputs * horizontal.outputs
    columns = kernels.shape[2] * vertical.length * horizontal.length
    if min(rows, columns) <= SMALL and groups * rows * columns <= _ENTRIES:
        return _unrolled(kernels, vertical, horizontal), "exact"
    padding = math.sqrt(vertical.copies * horizontal.copies)
    small = min(kernels.shape[1:3]) <= SMALL
    if all(axis.kernel == 1 and axis.before == axis.after == 0 for axis in axes) and (small or effort == "best"):
        return dense(kernels.flatten(2)), "exact"
    if effort == "fast":
        return _unfolded(kernels, SMALL) * padding, "upper"
    if all(axis.mode == "circular" and axis.outputs * axis.stride == axis.length for axis in axes):
        return _polyphase(kernels, vertical, horizontal, (vertical.length, horizontal.length)), "exact"
    value = _polyphase(kernels, vertical, horizontal, (_room(vertical), _room(horizontal))) * padding
    return min(value, _unfolded(kernels) * padding), "upper"


def _room(axis: Axis) -> int:
    """A circular grid on which no tap that reads padding comes round to the map; a multiple of the stride."""
    pads = max(axis.before, axis.after) if axis.mode == "zeros" else axis.before + axis.after
    return math.ceil(max(axis.length + pads, axis.outputs * axis.stride) / axis.stride) * axis.stride


def _unrolled(kernels: Tensor, vertical: Axis, horizontal: Axis) -> float:
    matrix = torch.einsum(
        "goiuv,yuh,xvw->goyxihw", kernels, *(axis.matrix().to(kernels) for axis in (vertical, horizontal))
    )
    return dense(matrix.flatten(4).flatten(1, 3))


def _unfolded(kernels: Tensor, largest: float = math.inf) -> float:
    """The bound by unfoldings; those with more rows and columns than ``largest`` are passed over."""
    g, o, i, kh, kw = kernels.shape
    taps = kh * kw
    shapes = [
        kernels.reshape(g, o, i * taps),
        kernels.permute(0, 1, 3, 4, 2).reshape(g, o * taps, i),
        kernels.permute(0, 1, 3, 2, 4).reshape(g, o * kh, i * kw),
        kernels.permute(0, 1, 4, 2, 3).reshape(g, o * kw, i * kh),
    ]
    values = [dense(matrix) for matrix in shapes if min(matrix.shape[1:]) <= largest]
    return math.sqrt(taps) * min(values, default=math.inf)


def _polyphase(kernels: Tensor, vertical: Axis, horizontal: Axis, grid: tuple[int, int]) -> float:
    """Norm of the strided circular convolution on a grid that the strides divide.

    At a frequency k of the output the map is the row of blocks K(k + j N / s), j = 0..s-1 along each axis, over the
    root of s_h s_w. A real kernel has conjugate blocks at k and -k, so half of the frequencies along one axis suffice.
    """
    phases = []
    for axis, size in zip((vertical, horizontal), grid, strict=True):
        taps = torch.arange(axis.kernel, dtype=torch.float64) * axis.dilation
        coarse = size // axis.stride
        frequencies = torch.arange(coarse)[:, None] + torch.arange(axis.stride) * coarse
        angle = frequencies.double()[..., None] * taps * (-2 * math.pi / size)
        phases.append(torch.polar(torch.ones_like(angle), angle).to(kernels.device))  # (coarse, stride, taps)
    down, across = phases
    down = down[: len(down) // 2 + 1]
    g, o, i = kernels.shape[:3]
    step = max(1, _CHUNK // (g * o * i * vertical.stride * horizontal.stride))
    largest = 0.0
    for line in down:
        rows = torch.einsum("goiuv,su->gosiv", kernels.to(line.dtype), line)
        for part in across.split(step):  # type: ignore[no-untyped-call]
            blocks = torch.einsum("gosiv,ktv->kgosti", rows, part)
            largest = max(largest, dense(blocks.flatten(3).flatten(0, 1)))
    return largest / math.sqrt(vertical.stride * horizontal.stride)


def _estimate(weight: Tensor, vertical: Axis, horizontal: Axis, groups: int) -> float:
    channels = weight.shape[1] * groups
    pads = (horizontal.before, horizontal.after, vertical.before, vertical.after)
    mode = {"zeros": "constant"}.get(vertical.mode, vertical.mode)
    stride = (vertical.stride, horizontal.stride)
    dilation = (vertical.dilation, horizontal.dilation)

    def forward(x: Tensor) -> Tensor:
        padded = functional.pad(x, pads, mode=mode) if any(pads) else x
        return functional.conv2d(padded, weight, None, stride, 0, dilation, groups)

    return _power(forward, weight.new_empty(1, channels, vertical.length, horizontal.length))


def _power(forward: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """Power iteration on the map and its adjoint, from a fixed start."""
    x = torch.randn(like.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(like.device)
    value = 0.0
    for _ in range(_POWER_STEPS):
        x = (x / x.norm()).requires_grad_()
        with torch.enable_grad():
            y = forward(x)
        value = float(y.detach().norm())
        if value == 0:
            return 0.0
        (x,) = torch.autograd.grad(y, x, y.detach())
    return value
