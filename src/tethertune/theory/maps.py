"""The linear maps that layers apply, and the norms of their matrices, without ever building them.

Each class is the geometry of a family of maps. ``norms(weight)`` are the norms of the matrix that the weight makes
with it; a displacement ``W - W0`` is measured by the same call, since the map is linear in its weight. All in float64.
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from tethertune.theory import spectral as spectra
from tethertune.theory.taps import Axis, Taps

__all__ = ["Convolution", "Dense", "Diagonal", "Effort", "LinearMap", "OperatorNorms", "Separable", "SpectralIs"]

Effort = Literal["best", "fast", "estimate"]
"""How the spectral norm is found: ``best``: exactly where that is feasible, else an upper bound over all frequencies;
``fast``: an upper bound from a few small matrices; ``estimate``: power iteration, which converges from below."""

SpectralIs = Literal["exact", "upper", "estimate"]


@dataclass(frozen=True)
class OperatorNorms:
    """Norms of the matrix of a linear map.

    Attributes:
        mars: Largest l1 norm of a row: the norm of the map from sup norm to sup norm.
        frobenius: Root of the sum of squares of all entries.
        two_one: Sum over the rows of their l2 norms, as in Appendix C of the paper.
        one: Largest l1 norm of a column.
        spectral: Largest singular value, or a bound or estimate of it.
        spectral_is: ``exact``, ``upper`` (a proven upper bound) or ``estimate`` (a lower bound).
        kernel_mars: Largest l1 norm of a row of the kernel: an upper bound of ``mars`` for every input size, and what
            the MARS constraint bounds.
    """

    mars: float
    frobenius: float
    two_one: float
    one: float
    spectral: float
    spectral_is: SpectralIs
    kernel_mars: float

    def scaled(self, factor: float) -> "OperatorNorms":
        """The norms of the map times a factor of 0 or more."""
        values = {name: factor * value for name, value in asdict(self).items() if name != "spectral_is"}
        return replace(self, **values)


class LinearMap(Protocol):
    """The geometry of a family of linear maps."""

    def mars(self, weight: Tensor) -> float:
        """Largest row l1 norm of the matrix."""

    def norms(self, weight: Tensor, effort: Effort = "best") -> OperatorNorms:
        """All norms of the matrix."""


@dataclass(frozen=True)
class Dense:
    """``copies`` times the same matrix side by side on the diagonal: a Linear layer, applied at that many places."""

    copies: int = 1

    def mars(self, weight: Tensor) -> float:
        """Largest row l1 norm."""
        return float(torch.linalg.vector_norm(weight.double(), 1, dim=1).max())

    def norms(self, weight: Tensor, effort: Effort = "best") -> OperatorNorms:
        """All norms; the weight is (out, in)."""
        weight = weight.double()
        rows = torch.linalg.vector_norm(weight, dim=1)
        mars = self.mars(weight)
        one = float(torch.linalg.vector_norm(weight, 1, dim=0).max())
        frobenius = float(rows.norm())
        status: SpectralIs = "estimate" if effort == "estimate" else "exact"
        if effort == "fast" and min(weight.shape) > spectra.SMALL:
            value, status = min(math.sqrt(mars * one), frobenius), "upper"
        else:
            value = spectra.dense(weight.unsqueeze(0), effort)
        return OperatorNorms(
            mars, frobenius * math.sqrt(self.copies), float(rows.sum()) * self.copies, one, value, status, mars
        )


@dataclass(frozen=True)
class Diagonal:
    """One factor a channel, the same at each of ``copies`` places: batch norm in eval mode."""

    copies: int = 1

    def mars(self, weight: Tensor) -> float:
        """Largest factor in size."""
        return float(weight.double().abs().max())

    def norms(self, weight: Tensor, effort: Effort = "best") -> OperatorNorms:  # noqa: ARG002 (always exact)
        """All norms; the weight is (channels,)."""
        weight = weight.double().abs()
        top = float(weight.max())
        frobenius = float(weight.square().sum().sqrt()) * math.sqrt(self.copies)
        return OperatorNorms(top, frobenius, float(weight.sum()) * self.copies, top, top, "exact", top)


@dataclass(frozen=True, eq=False)
class Separable:
    """The same pair of matrices, one an axis, on each channel: average pooling of any kind.

    Its weight is one number that multiplies it.
    """

    vertical: Tensor
    """(H', H), float64."""
    horizontal: Tensor
    """(W', W), float64."""
    channels: int

    def mars(self, weight: Tensor) -> float:
        """Largest row l1 norm: that of a Kronecker product is the product."""
        rows = [matrix.abs().sum(1).max() for matrix in (self.vertical, self.horizontal)]
        return float(rows[0] * rows[1]) * abs(float(weight))

    def norms(self, weight: Tensor, effort: Effort = "best") -> OperatorNorms:  # noqa: ARG002 (always exact)
        """All norms, each the product of the two axes' norms."""
        pair = (self.vertical, self.horizontal)
        factor = abs(float(weight))

        def product(norm: float) -> float:
            return factor * math.prod(float(torch.linalg.matrix_norm(matrix, norm)) for matrix in pair)

        frobenius = factor * math.prod(float(matrix.square().sum().sqrt()) for matrix in pair)
        two_one = factor * math.prod(float(matrix.square().sum(1).sqrt().sum()) for matrix in pair)
        mars = self.mars(weight)
        return OperatorNorms(
            mars,
            frobenius * math.sqrt(self.channels),
            two_one * self.channels,
            product(1),
            product(2),
            "exact",
            mars,
        )


@dataclass(frozen=True)
class Convolution:
    """A two-dimensional convolution, or the transposed map of one.

    The weight is (out, in / groups, kh, kw) of the convolution from maps of ``vertical.length`` x
    ``horizontal.length``. A transposed convolution is the transpose of the convolution that has the same weight,
    so its rows are that one's columns; its geometry here is that of the convolution it transposes.
    """

    vertical: Axis
    horizontal: Axis
    groups: int = 1
    transposed: bool = False

    @cached_property
    def _taps(self) -> tuple[Taps, Taps]:
        return Taps.of(self.vertical), Taps.of(self.horizontal)

    def sums(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums over each row and each column of the matrix, of sizes and of squares.

        Returns:
            Row sums of absolute values and of squares, column sums of absolute values and of squares; float64,
            rows (channels, H', W'), columns (channels, H, W), of the map itself (also where it is transposed).
        """
        vertical, horizontal = self._taps
        entries = horizontal.merged(vertical.merged(_two_dimensional(weight), 2), 3)
        sizes, squares = entries.abs(), entries.square()
        if self.transposed:
            return self._columns(sizes), self._columns(squares), self._rows(sizes), self._rows(squares)
        return self._rows(sizes), self._rows(squares), self._columns(sizes), self._columns(squares)

    def _rows(self, values: Tensor) -> Tensor:
        vertical, horizontal = self._taps
        return torch.einsum("oab,ay,bx->oyx", values.sum(1), vertical.rows.to(values), horizontal.rows.to(values))

    def _columns(self, values: Tensor) -> Tensor:
        vertical, horizontal = self._taps
        out, inner = values.shape[:2]
        by_input = values.view(self.groups, out // self.groups, *values.shape[1:]).sum(1)
        by_input = by_input.reshape(self.groups * inner, *values.shape[2:])
        counts = vertical.columns.to(values), horizontal.columns.to(values)
        return torch.einsum("oab,ay,bx->oyx", by_input, *counts)

    def mars(self, weight: Tensor) -> float:
        """Largest row l1 norm, exactly, for this input size."""
        vertical, horizontal = self._taps
        entries = horizontal.merged(vertical.merged(_two_dimensional(weight), 2), 3).abs()
        sums = self._columns(entries) if self.transposed else self._rows(entries)
        return float(sums.max())

    def norms(self, weight: Tensor, effort: Effort = "best") -> OperatorNorms:
        """All norms; exact for every padding mode but the spectral one."""
        weight = _two_dimensional(weight)
        row_sizes, row_squares, column_sizes, _ = self.sums(weight)
        mars, one = float(row_sizes.max()), float(column_sizes.max())
        frobenius = float(row_squares.sum().sqrt())
        value, status = spectra.convolution(weight, self.vertical, self.horizontal, self.groups, effort)
        if status == "upper":
            value = min(value, math.sqrt(mars * one), frobenius)
        return OperatorNorms(
            mars, frobenius, float(row_squares.sqrt().sum()), one, value, status, self.kernel_mars(weight)
        )

    def kernel_mars(self, weight: Tensor) -> float:
        """Largest l1 norm of the kernel of one output channel."""
        sizes = _two_dimensional(weight).abs().sum((2, 3))
        if not self.transposed:
            return float(sizes.sum(1).max())
        return float(torch.stack([block.sum(0).max() for block in sizes.chunk(self.groups)]).max())


def _two_dimensional(weight: Tensor) -> Tensor:
    """A kernel in float64, one over a single dimension seen as one of height 1."""
    return (weight.unsqueeze(2) if weight.ndim == 3 else weight).double()
