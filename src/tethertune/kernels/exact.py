"""Projection onto the balls, exact in the stored dtype: the definitions in float64, then rounding that stays inside.

Plain tensor operations without a look from the host, on any device. :mod:`tethertune.kernels.chunked` does the same
work faster for most rows on a CPU and calls this for the rest.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tethertune import norms
from tethertune.kernels.rounding import MARGIN, fit

__all__ = ["Projection", "rows", "scaled"]

Projection = Callable[[Tensor, Tensor], Tensor]
"""A function of :mod:`tethertune.projections` from a displacement and the radius of each row to the projected one."""


def rows(W: Tensor, centre: Tensor, radius: Tensor, projection: Projection) -> tuple[Tensor, Tensor]:
    """Bring the rows that are outside their l1 balls inside; every other row keeps its bits.

    Args:
        W: Stored weights, (rows, columns).
        centre: Their reference, of any floating dtype, (rows, columns).
        radius: Of each row, float64, (rows,).
        projection: Radial or Euclidean.

    Returns:
        The weights, and which rows are not finite (these are left as they are), bool, (rows,).
    """
    centre = centre.double()
    T = W.double() - centre
    distance = norms.row_sums(T)
    finite = distance.isfinite()
    rounded = (centre + projection(T, radius * (1 - 2 * MARGIN))).to(W.dtype)
    fitted = fit(rounded, centre, radius * (1 - MARGIN), power=1)
    return torch.where(((distance > radius) & finite).unsqueeze(1), fitted, W), ~finite


def scaled(W: Tensor, centre: Tensor, scale: Tensor, budget: Tensor) -> Tensor:
    """A part of a layer scaled towards its centre so that its sum of squares stays within its share of the ball.

    Args:
        W: Stored weights, of any shape.
        centre: Their reference, of the same shape.
        scale: Float64, 0-d; ``scale**2`` times the part's sum of squares is within the budget.
        budget: The largest sum of squares of the result, float64, 0-d.

    Returns:
        The scaled weights, of the shape and dtype of ``W``.
    """
    flat, centre = W.reshape(1, -1), centre.double().reshape(1, -1)
    rounded = (centre + (flat.double() - centre) * scale).to(W.dtype)
    return fit(rounded, centre, budget.reshape(1), power=2).view(W.shape)
