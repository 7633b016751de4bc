"""The step in plain PyTorch: cache-sized chunks of rows, one scratch, and a write only where a row is outside.

Three levels, each handing on to the next what it cannot prove:

1. *Measure.* The distance of every row, from differences in float32 added up in float32 over at most 128 of them
   and in float64 from there: a relative error of at most ``2 ** -16``, whatever the order of a sum. A row that is
   inside by more than that is done. This is all that happens to most rows.
2. *Scale.* Rows that are outside by more than that are scaled in float32 to ``1 - 2 ** -15`` of the radius. Where
   the radius is so small beside the weights that their rounding could undo it, they are measured again.
3. *Exact.* What is left (16-bit weights, Euclidean projection, radii near the rounding of the weights, rows that are
   not finite) goes through :mod:`tethertune.kernels.exact`.

On a CPU the host looks between the levels, which costs nothing there. On an accelerator a look would stall the
device, so every row goes through level 3, masked.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tethertune import norms, projections
from tethertune.kernels import exact
from tethertune.kernels.rounding import MARGIN, floor

__all__ = ["Chunked", "Parts", "gapless_rows", "working_set"]

Parts = Sequence[tuple[Tensor, Tensor]]
"""A layer as pairs of weights and reference, whose axis 0 numbers the rows. The weights are changed in place, the
reference may be on another device."""

_CPU_CHUNK = 1 << 19
_DEVICE_CHUNK = 1 << 22
_BYTES = 96  # a weight of a chunk, for float64 copies in level 3
_FAR = 1e15  # times the radius; from there the scale could lose digits
_SMALLEST = 1e-15  # a distance whose square float32 still holds with all its digits
_MOST_ROWS = 1 << 14  # a sum over more would be split among threads, and its last bits depend on their number


@dataclass(frozen=True)
class _Precision:
    """What arithmetic in a dtype can prove about a sum.

    Attributes:
        dtype: Of the differences and their scaling.
        error: The largest relative error of a measured sum of distances or of squares.
        aim: The share of the radius by which scaling aims inside.
    """

    dtype: torch.dtype
    error: float
    aim: float

    def least_radius(self, size: float) -> float:
        r"""The least radius that scaling is sure to reach around a centre of the given norm, without measuring again.

        Scaling rounds each weight by at most :math:`u |w| + 4 u |t|`, with u half the dtype's epsilon: by
        :math:`u (\text{size} + 5 \gamma)` in all. What is aimed inside, less the error of the measured distance, is
        at least :math:`\gamma \, \text{aim} / 4`.
        """
        u = torch.finfo(self.dtype).eps / 2
        return max(u * size / (self.aim / 4 - 5 * u), 1e-30)


_SINGLE = _Precision(torch.float32, 2.0**-16, 2.0**-15)
_DOUBLE = _Precision(torch.float64, 2.0**-44, MARGIN)


class Chunked:
    """Projects the weights of a layer in place, a chunk at a time.

    Args:
        projection: ``"radial"`` or ``"euclidean"``, for the rows of the MARS ball.
    """

    def __init__(self, projection: str = "radial") -> None:
        self._project = projections.l1_rows if projection == "radial" else projections.l1_rows_euclidean
        self._scratch: dict[tuple[torch.dtype, torch.device, int], Tensor] = {}

    # --------------------------------------------------------------------------------------------------- MARS ball

    def rows(self, W: Tensor, centre: Tensor, radius: Tensor, *, size: float = math.inf) -> int | Tensor:
        """Project each row onto the l1 ball around its centre.

        Args:
            W: Weights whose axis 0 numbers the rows; changed in place, only where a row is outside.
            centre: The reference, of the same shape, on any device.
            radius: Of each row, float64, (rows,), on the weights' device.
            size: The largest l1 norm of a row of the centre; a finite one can save measuring again after scaling.

        Returns:
            The number of rows that are not finite, which are left as they are: a number on a CPU, else a 0-d tensor.
        """
        on_cpu = W.device.type == "cpu"
        sure = on_cpu and bool((radius >= _precision(W, centre).least_radius(size)).all())
        broken: int | Tensor = 0
        start = 0
        for w, matrix, centres in _chunks([(W, centre)]):
            radii = radius[start : start + len(matrix)]
            start += len(matrix)
            if on_cpu:
                changed, bad = self._rows_on_cpu(matrix, centres, radii, sure=sure)
                broken += bad
            else:
                result, bad_rows = exact.rows(matrix, centres, radii, self._project)
                matrix.copy_(result)
                changed, broken = True, broken + bad_rows.sum()
            if changed:
                _write_back(w, matrix)
        return broken

    def _rows_on_cpu(self, W: Tensor, centre: Tensor, radius: Tensor, *, sure: bool) -> tuple[bool, int]:
        """One chunk: whether anything was written, and the number of rows that are not finite."""
        precision = _precision(W, centre)
        distance = self._row_sums(W, centre, precision)
        inside = distance <= radius * (1 - precision.error)
        if bool(inside.all()):
            return False, 0
        suspects = (~inside).nonzero().squeeze(1)
        if W.dtype == precision.dtype and self._project is projections.l1_rows:
            suspects = self._scale_rows(W, centre, radius, distance, suspects, sure=sure)
        if not len(suspects):
            return True, 0
        result, bad = exact.rows(W[suspects], centre[suspects], radius[suspects], self._project)
        W.index_copy_(0, suspects, result)
        return True, int(bad.sum())

    def _scale_rows(
        self, W: Tensor, centre: Tensor, radius: Tensor, distance: Tensor, suspects: Tensor, *, sure: bool
    ) -> Tensor:
        """Level 2: scale the suspects that are surely outside; those that it does not settle come back."""
        precision = _precision(W, centre)
        outside = (distance > radius * (1 + precision.error)) & (distance < _FAR * radius)
        scale = (radius * (1 - precision.aim) / distance).to(W.dtype).unsqueeze(1)
        if bool(outside.all()):
            torch.lerp(centre.to(W.dtype), W, scale, out=W)
            if sure:
                return suspects[:0]
            inside = self._row_sums(W, centre, precision) <= radius * (1 - precision.error)
            return suspects[:0] if bool(inside.all()) else (~inside).nonzero().squeeze(1)
        chosen = outside.nonzero().squeeze(1)
        w, c = W[chosen], centre[chosen]
        torch.lerp(c.to(W.dtype), w, scale[chosen], out=w)
        W.index_copy_(0, chosen, w)
        settled = torch.zeros_like(outside)
        settled[chosen] = sure or self._row_sums(w, c, precision) <= (radius * (1 - precision.error))[chosen]
        return suspects[~settled[suspects]]

    def distances(self, W: Tensor, centre: Tensor, *, exactly: bool = True) -> Tensor:
        """The l1 distance of each row from its centre: float64, (rows,).

        Args:
            W: Weights whose axis 0 numbers the rows.
            centre: The reference, of the same shape, on any device.
            exactly: Take the differences in float64, as the promise states it; otherwise with the error of level 1.
        """
        parts = [
            self._row_sums(matrix, centres, _DOUBLE if exactly else _precision(matrix, centres))
            for _, matrix, centres in _chunks([(W, centre)])
        ]
        return torch.cat(parts) if parts else torch.zeros(len(W), dtype=torch.float64, device=W.device)

    # ---------------------------------------------------------------------------------------------- Frobenius ball

    def frobenius(self, parts: Parts, radius: float, *, size: float = math.inf) -> int:
        """Project a whole layer on a CPU onto the Frobenius ball.

        Args:
            parts: The layer.
            radius: The largest distance allowed.
            size: The Frobenius norm of the centre; a finite one can save measuring again after scaling.

        Returns:
            1 if the layer is not finite, which is left as it is; else 0.
        """
        squares = self.squares(parts, exactly=False)
        total = float(squares.sum())
        distance = math.sqrt(total)
        if _SMALLEST < distance <= radius * (1 - _SINGLE.error):
            return 0
        if not max(radius * (1 + _SINGLE.error), _SMALLEST) < distance < math.inf:
            squares = self.squares(parts, exactly=True)
            total = float(squares.sum())
            if not math.isfinite(total):
                return 1
            if math.sqrt(total) <= radius:
                return 0
        if self._scale_surely(parts, radius, distance, size):
            return 0
        floors = [float(floor(matrix, centres)) for _, matrix, centres in _chunks(parts)]
        shrink = max(radius * radius * (1 - MARGIN) - sum(floors), 0.0) / total
        for (w, matrix, centres), square, least in zip(_chunks(parts), squares.tolist(), floors, strict=True):
            self._scale_part(matrix, centres, shrink * square, least, math.sqrt(shrink))
            _write_back(w, matrix)
        return 0

    def _scale_surely(self, parts: Parts, radius: float, distance: float, size: float) -> bool:
        """Scale a layer that is surely outside where rounding surely cannot bring it outside again; whether it did."""
        precision = _precision(*parts[0])
        surely_outside = max(radius * (1 + precision.error), _SMALLEST) < distance < _FAR * radius
        if parts[0][0].dtype != precision.dtype or not surely_outside or radius < precision.least_radius(size):
            return False
        for w, matrix, centres in _chunks(parts):
            torch.lerp(centres.to(matrix.dtype), matrix, radius * (1 - precision.aim) / distance, out=matrix)
            _write_back(w, matrix)
        return True

    def _scale_part(self, W: Tensor, centre: Tensor, square: float, least: float, scale: float) -> None:
        """Scale a chunk in place so that its sum of squares is at most ``square`` plus its floor, ``least``."""
        precision = _precision(W, centre)
        if W.dtype == precision.dtype and square > _SMALLEST**2:
            torch.lerp(centre.to(W.dtype), W, scale * (1 - precision.aim), out=W)
            if float(self._sum_of_squares(W, centre, precision)) <= square * (1 - precision.error):
                return
        reached = float(self._sum_of_squares(W, centre, _DOUBLE))
        if reached > square + least:
            rest = torch.tensor(math.sqrt(square / reached) * (1 - MARGIN), dtype=torch.float64)
            W.copy_(exact.scaled(W, centre, rest, torch.tensor(square + least, dtype=torch.float64)))

    def squares(self, parts: Parts, *, exactly: bool) -> Tensor:
        """The sum of squares of each chunk of a layer's displacement, float64, (chunks,).

        Args:
            parts: The layer.
            exactly: Take the differences in float64, as the promise states it; otherwise each sum has the error of
                level 1, and is worthless for distances below ``1e-15``, whose squares float32 cannot hold.
        """
        sums = [
            self._sum_of_squares(matrix, centres, _DOUBLE if exactly else _precision(matrix, centres))
            for _, matrix, centres in _chunks(parts)
        ]
        return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64)

    def shares(self, parts: Parts) -> Tensor:
        """What :meth:`scale` needs of each chunk: its exact sum of squares, and its floor; float64, (chunks, 2)."""
        found = [
            torch.stack([self._sum_of_squares(matrix, centres, _DOUBLE), floor(matrix, centres)])
            for _, matrix, centres in _chunks(parts)
        ]
        return torch.stack(found) if found else torch.zeros(0, 2, dtype=torch.float64)

    def scale(self, parts: Parts, radius: float, shares: Tensor, total: Tensor) -> None:
        """Scale a layer, or this rank's part of one, onto the Frobenius ball without a look from the host.

        It stays as it is where ``total`` is inside or not finite.

        Args:
            parts: The layer, or this rank's part of it.
            radius: The largest distance allowed.
            shares: What :meth:`shares` returned for these parts.
            total: Their sum over all parts on all ranks, float64, (2,). Every chunk stays within its own share, so
                nothing needs to be added up again.
        """
        squares, floors = total
        outside = (squares.sqrt() > radius) & squares.isfinite()
        shrink = torch.where(outside, (radius * radius * (1 - MARGIN) - floors).clamp(min=0) / squares, 1.0)
        for (w, matrix, centres), (square, least) in zip(_chunks(parts), shares, strict=True):
            moved = exact.scaled(matrix, centres, shrink.sqrt() * (1 - MARGIN), shrink * square + least)
            matrix.copy_(torch.where(outside, moved, matrix))
            _write_back(w, matrix)

    # ----------------------------------------------------------------------------------------------------- scratch

    def _row_sums(self, W: Tensor, centre: Tensor, precision: _Precision) -> Tensor:
        return _sum_rows(self._difference(W, centre, precision).abs_())

    def _sum_of_squares(self, W: Tensor, centre: Tensor, precision: _Precision) -> Tensor:
        return _sum_rows(self._difference(W, centre, precision).square_()).sum()

    def _difference(self, W: Tensor, centre: Tensor, precision: _Precision) -> Tensor:
        """``W - centre`` in the scratch."""
        out = self._buffer(W, precision.dtype, 0)
        if W.dtype == precision.dtype:
            return torch.sub(W, centre, out=out)
        return out.copy_(W).sub_(centre)

    def _buffer(self, like: Tensor, dtype: torch.dtype, number: int) -> Tensor:
        """A part of the scratch in the shape of ``like``; the scratch grows to the largest chunk and is kept."""
        key = (dtype, like.device, number)
        if key not in self._scratch or self._scratch[key].numel() < like.numel():
            self._scratch[key] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return self._scratch[key][: like.numel()].view(like.shape)

    def nbytes(self) -> int:
        """The bytes of the scratch."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._scratch.values())


def working_set(parts: Parts) -> int:
    """The most bytes that projecting or measuring a layer takes for a moment; 89 a weight were the most measured."""
    return max((_BYTES * W[: _rows_at_once(W)].numel() for W, _ in parts if W.numel()), default=0)


def _precision(W: Tensor, centre: Tensor) -> _Precision:
    return _DOUBLE if torch.float64 in (W.dtype, centre.dtype) else _SINGLE


def _sum_rows(X: Tensor) -> Tensor:
    """The sum of each row of non-negative numbers, float64, with a relative error of at most ``127 * 2 ** -24``."""
    if X.dtype == torch.float64:
        return norms.add_up_rows(X)
    columns = X.shape[1]
    width = _part_of_a_row(columns)
    whole = columns // width * width
    sums = norms.add_up_rows(X[:, :whole].reshape(len(X), whole // width, width).sum(dim=2))
    return sums if whole == columns else sums + X[:, whole:].sum(dim=1)


@functools.lru_cache
def _part_of_a_row(columns: int) -> int:
    """The largest divisor of the number of columns that is at most 128; 128 where it would be too small to pay."""
    width = max(d for d in range(1, 129) if columns % d == 0)
    return width if width >= 16 or width == columns else 128


def _chunks(parts: Parts) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Cache-sized stretches of rows: the view of the weights, and weights and reference as (rows, columns)."""
    for W, centre in parts:
        if not W.numel():
            continue
        rows = _rows_at_once(W)
        for start in range(0, len(W), rows):
            w, c = W[start : start + rows], centre[start : start + rows]
            c = c.to(W.device, non_blocking=W.device.type != "cpu")  # a copy to the host must have arrived
            yield w, *_matrices(w, c)


def _rows_at_once(W: Tensor) -> int:
    size = _CPU_CHUNK if W.device.type == "cpu" else _DEVICE_CHUNK
    return max(1, min(_MOST_ROWS, size * len(W) // W.numel()))


def _matrices(w: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and reference as (rows, columns) with one order of columns; views wherever each row is gapless.

    Sums do not depend on the order of the columns, so a row is taken in the order of its memory: ``channels_last``
    kernels need no copy.
    """
    rows, columns = len(w), w.numel() // len(w)
    if gapless_rows(w, columns):
        constant = not any(c.stride())  # the head's centre is one zero, expanded
        if constant or w.stride() == c.stride():
            inner = (0, 0) if constant else (c.stride(0), 1)
            return w.as_strided((rows, columns), (w.stride(0), 1)), c.as_strided((rows, columns), inner)
    return w.reshape(rows, columns), c.reshape(rows, columns)


def gapless_rows(w: Tensor, columns: int) -> bool:
    """Whether each row fills a stretch of memory, in any order of its axes."""
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(w.shape[1:], w.stride()[1:], strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return expected == columns


def _write_back(w: Tensor, matrix: Tensor) -> None:
    """Copy a chunk that :func:`_matrices` had to copy out back into the weights."""
    if matrix.data_ptr() != w.data_ptr():
        w.copy_(matrix.view(w.shape))
