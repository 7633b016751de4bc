"""The (sub)gradients of penalties, added in place without a copy of a weight: in C, or in cache-sized chunks.

l2-SP reads the weights, the reference and the gradient once and writes the gradient once. MARS-SP reads the weights
and the reference once, and writes one row of each layer's gradient. Both ways give the same up to rounding.
"""

import ctypes
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tethertune.kernels import backend, library, native
from tethertune.kernels.chunked import Chunked, Parts, gapless_rows
from tethertune.kernels.stretches import Stretches, as_stretches
from tethertune.rows import Rows

__all__ = ["Chunks", "Gradients", "Pull"]

_CPU_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 24
_NEAR = 1 - 2.0**-14  # of the largest row's distance; the error of a first look is a quarter of the difference to 1


class Pull(NamedTuple):
    r"""What a penalty does to one layer: :math:`\text{factor} \cdot (W - c)`, or :math:`\text{factor}` times its signs.

    Attributes:
        gradient: What is added to, in place; of the weights' shape.
        weight: The weights.
        centre: Their reference, beside them; one 0 expanded for a head.
        rows: How they are cut into rows.
        factor: Of the displacement.
    """

    gradient: Tensor
    weight: Tensor
    centre: Tensor
    rows: Rows
    factor: float


class Gradients:
    """Adds the gradients of a norm of some layers.

    Args:
        norm: ``"frobenius"`` for :math:`W - c`, half the gradient of its square; ``"mars"`` for the sign of the
            displacement in one row of the largest l1 norm, and 0 in the others.
    """

    def __init__(self, norm: str) -> None:
        self._norm = norm
        self._chunks = Chunks()
        self._forms: list[object] = []
        self._table: _Table | None = None
        self._rest: list[int] = []

    def add(self, pulls: Sequence[Pull], scale: Tensor | None = None) -> None:
        """Add to the gradient of every layer.

        Args:
            pulls: One a layer.
            scale: 0-d, multiplies all factors; on an accelerator it stays unknown to the host. ``None`` for 1.
        """
        forms: list[object] = [backend.forced(), scale is None, *map(_form, pulls)]
        if forms != self._forms:
            self._plan(pulls, taken=scale is None)
            self._forms = forms
        if self._table is not None:
            self._table.add(pulls)
        for number in self._rest:
            self._add_in_chunks(pulls[number], scale)

    def _plan(self, pulls: Sequence[Pull], *, taken: bool) -> None:
        """Put what suits the C kernels into a table; it holds as long as weights and centres stay where they are."""
        rows = {i: found for i, pull in enumerate(pulls) if taken and (found := _stretches(pull, self._norm))}
        self._rest = [i for i in range(len(pulls)) if i not in rows]
        self._table = _Table(rows, self._norm) if rows else None

    def _add_in_chunks(self, pull: Pull, scale: Tensor | None) -> None:
        gradient, W, centre, rows, factor = pull
        if scale is not None:
            scale = scale.to(W.device, non_blocking=True)
        if self._norm == "frobenius":
            self._chunks.add_displacement(gradient, W, centre, factor, scale)
        else:
            parts = list(zip(rows.blocks(W), rows.blocks(centre), strict=True))
            self._chunks.add_sign_of_largest_row(rows.blocks(gradient), parts, factor, scale)


# --------------------------------------------------------------------------------------------------------------- in C


class _Table:
    """Layers that one C call adds to.

    Args:
        rows: Weights and centres by the number of their layer.
        norm: ``"frobenius"`` or ``"mars"``.
    """

    def __init__(self, rows: dict[int, Stretches], norm: str) -> None:
        self._rows = rows  # keeps the memory
        self._blocks = (native.Block * len(rows))(*map(native.Block.of, rows.values()))
        self._gradients = (ctypes.c_void_p * len(rows))()
        self._factors = (ctypes.c_double * len(rows))()
        self._function = _function(norm)

    def add(self, pulls: Sequence[Pull]) -> None:
        for place, number in enumerate(self._rows):
            pull = pulls[number]
            self._gradients[place] = pull.gradient.data_ptr()
            self._factors[place] = pull.factor
        threads = torch.get_num_threads()
        if self._function(self._blocks, self._gradients, self._factors, len(self._rows), threads):
            raise MemoryError("no memory for the distances of the rows")


def _form(pull: Pull) -> tuple[object, ...]:
    """What a table counts on; gradients may move."""
    gradient, W, centre, *_ = pull
    alike = gradient.dtype is W.dtype and gradient.stride() == W.stride()
    return (W.data_ptr(), W.dtype, W.shape, W.stride(), centre.data_ptr(), centre.dtype, centre.stride(), alike)


def _stretches(pull: Pull, norm: str) -> Stretches | None:
    """Weights and centre for the C kernels; ``None`` where these cannot take them."""
    gradient, W, centre, rows, _ = pull
    if backend.choose(W.device) != "native" or gradient.dtype is not W.dtype or gradient.stride() != W.stride():
        return None
    if norm == "frobenius":
        W, centre = W.unsqueeze(0), centre.unsqueeze(0)
    elif rows.groups > 1:
        return None
    else:
        (W,), (centre,) = rows.blocks(W), rows.blocks(centre)
    found = as_stretches(W, centre, torch.empty(0, dtype=torch.float64), size=math.inf, by_row=True)
    return found if found is not None and native.supports(found) else None


@functools.cache
def _function(norm: str) -> Callable[..., int]:
    loaded = library.load()
    function = loaded.tethertune_pull_squares if norm == "frobenius" else loaded.tethertune_pull_rows
    function.restype = ctypes.c_int
    arrays = [ctypes.POINTER(t) for t in (native.Block, ctypes.c_void_p, ctypes.c_double)]
    function.argtypes = [*arrays, ctypes.c_int64, ctypes.c_int]
    return function


# ---------------------------------------------------------------------------------------------------------- in chunks


class Chunks:
    """Adds to the gradient of one layer in plain PyTorch, with a scratch of the size of a chunk that is kept."""

    def __init__(self) -> None:
        self._measure = Chunked()
        self._scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def add_displacement(
        self, gradient: Tensor, W: Tensor, centre: Tensor, factor: float, scale: Tensor | None = None
    ) -> None:
        r"""Add :math:`\text{factor} \cdot \text{scale} \cdot (W - c)`, the difference taken in float32 or wider."""
        for g, w, c in _pieces(gradient, W, centre):
            T = self._difference(w, c)
            if scale is not None:
                T.mul_(scale)
            g.add_(T, alpha=factor)

    def add_sign_of_largest_row(
        self, gradients: Sequence[Tensor], parts: Parts, factor: float, scale: Tensor | None = None
    ) -> None:
        r"""Add :math:`\text{factor} \cdot \text{scale} \cdot \operatorname{sign}(t)` to the row t of largest l1 norm.

        Args:
            gradients: What is added to, in place, in the blocks of ``parts``.
            parts: A layer as blocks of weights and reference whose axis 0 numbers the rows, all of the same length.
            factor: Known to the host.
            scale: 0-d, known to the device alone; ``None`` for 1.
        """
        largest = self._largest_row(parts)
        for k, (gradient, (W, centre)) in enumerate(zip(gradients, parts, strict=True)):
            row = (largest - k * len(W)).reshape(1)
            here = (row >= 0) & (row < len(W))
            row = row.clamp(0, len(W) - 1)
            sign = _wide_difference(W.index_select(0, row), centre.index_select(0, row)).sign()
            sign *= factor * here.view(-1, *[1] * (sign.ndim - 1))
            moved = gradient.index_select(0, row) + (sign if scale is None else sign * scale)
            gradient.index_copy_(0, row, moved.to(gradient.dtype))

    def _largest_row(self, parts: Parts) -> Tensor:
        """The number of the row with the largest l1 distance, counted through all blocks: int64, 0-d.

        On a CPU the host looks at the rows that a first measurement in float32 cannot tell apart, and measures them in
        float64; on an accelerator, where a look would stall, all are.
        """
        on_cpu = parts[0][0].device.type == "cpu"
        sums = torch.cat([self._measure.distances(W, centre, exactly=not on_cpu) for W, centre in parts])
        largest = sums.argmax()
        if not on_cpu:
            return largest
        near = (sums >= sums[largest] * _NEAR).nonzero().squeeze(1)
        if len(near) <= 1 or not sums[largest]:  # one, or a NaN, or nothing has moved
            return largest
        rows = len(parts[0][0])
        exactly = [
            self._measure.distances(W[rest], centre[rest])
            for k, (W, centre) in enumerate(parts)
            for rest in [near[near // rows == k] - k * rows]
        ]
        return near[torch.cat(exactly).argmax()]

    def _difference(self, W: Tensor, centre: Tensor) -> Tensor:
        """``W - centre`` in the scratch, in float32 or wider."""
        dtype = torch.promote_types(W.dtype, torch.float32)
        held = self._scratch.get((dtype, W.device))
        if held is None or held.numel() < W.numel():
            held = self._scratch[dtype, W.device] = torch.empty(W.numel(), dtype=dtype, device=W.device)
        out = held[: W.numel()].view(W.shape)
        return torch.sub(W, centre, out=out) if W.dtype == dtype else out.copy_(W).sub_(centre)


def _wide_difference(W: Tensor, centre: Tensor) -> Tensor:
    dtype = torch.promote_types(W.dtype, torch.float32)
    return W.to(dtype) - centre.to(dtype)


def _pieces(gradient: Tensor, W: Tensor, centre: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chunks of the three: stretches of memory where they lie in the same order without gaps, else along axis 0."""
    size = _CPU_CHUNK if W.device.type == "cpu" else _DEVICE_CHUNK
    constant = not any(centre.stride())  # the head's centre is one zero, expanded
    same_order = gradient.stride() == W.stride() and (constant or centre.stride() == W.stride())
    if same_order and gapless_rows(W.unsqueeze(0), W.numel()):
        gradient, W = (t.as_strided((t.numel(),), (1,)) for t in (gradient, W))
        centre = centre.as_strided(W.shape, (0 if constant else 1,))
    step = max(1, size * len(W) // max(W.numel(), 1))
    for start in range(0, len(W), step):
        end = start + step
        yield gradient[start:end], W[start:end], centre[start:end]
