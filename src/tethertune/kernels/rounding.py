r"""From a real projection to stored numbers: rounding that cannot leave the ball.

Rounding to nearest moves each weight by at most half a unit in the last place, and about half of all projected rows
end outside by a few of them. In float32 that is :math:`10^{-7}` of the radius; in bfloat16 it is up to some percent.
So the result is rounded to nearest, measured, and where it is outside, just enough of its weights are moved by ONE
unit in the last place towards the centre. One pass suffices where the centre is a stored number itself: a weight moved
towards the centre after rounding to nearest is at least as near to it as the unrounded weight was, and the unrounded
row was inside.

The centre may also lie between stored numbers (16-bit weights around a float32 reference). Then no weight comes nearer
to it than the stored number nearest to the centre, its *floor*, and a second pass moves weights there.
"""

import torch
from torch import Tensor

from tethertune import norms

__all__ = ["MARGIN", "fit", "floor", "holds", "step_towards"]

MARGIN = 2.0**-40
"""The share of the radius by which projections aim inside, so that float64 sums may be taken in any order."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def step_towards(W: Tensor, centre: Tensor) -> Tensor:
    """The stored numbers next to W on the side of the centre; W itself where it is the centre.

    Args:
        W: Finite weights, of any floating dtype of 2, 4 or 8 bytes.
        centre: Of the same shape, of any floating dtype.

    Returns:
        Of the shape and dtype of ``W``.
    """
    integer = _INTEGERS[W.element_size()]
    lowest = torch.iinfo(integer).min
    bits = W.contiguous().view(integer)
    # Sign and magnitude to two's complement, an order-preserving map, which is its own inverse.
    ordered = torch.where(bits < 0, lowest - bits, bits)
    ordered = ordered + torch.sign(centre.double() - W.double()).to(integer)
    return torch.where(ordered < 0, lowest - ordered, ordered).view(W.dtype)


def fit(W: Tensor, centre: Tensor, budget: Tensor, power: int) -> Tensor:
    r"""Move weights one step towards the centre, first to last in each row, until the row is within its budget.

    Args:
        W: Stored weights (rows, columns), each row a rounded point of the ball.
        centre: The centre, of the same shape and any floating dtype.
        budget: The largest allowed :math:`\sum_i |W_{ri} - c_{ri}|^p` a row, float64, (rows,); at least its floor.
        power: p, 1 for the l1 norm of rows or 2 for the squared Frobenius norm.

    Returns:
        The weights, of the shape and dtype of ``W``.
    """
    W = _move(W, step_towards(W, centre), centre, budget, power)
    return W if holds(W, centre) else _move(W, centre.to(W.dtype), centre, budget, power)


def _move(W: Tensor, closer: Tensor, centre: Tensor, budget: Tensor, power: int) -> Tensor:
    """Replace weights by closer ones, first to last in each row, until the row is within its budget."""
    centre = centre.double()
    size = (W.double() - centre).abs() ** power
    gain = (size - (closer.double() - centre).abs() ** power).clamp_(min=0)
    excess = norms.add_up_rows(size) - budget
    gained_before = gain.cumsum(dim=1) - gain
    taken = (gained_before < excess.unsqueeze(1)) & (gain > 0)
    return torch.where(taken, closer, W)


def holds(W: Tensor, centre: Tensor) -> bool:
    """Whether the dtype of the weights has every number of the centre's."""
    return torch.promote_types(W.dtype, centre.dtype) == W.dtype


def floor(W: Tensor, centre: Tensor) -> Tensor:
    """The smallest sum of squares that weights in the dtype of ``W`` can have around the centre, float64, 0-d."""
    if holds(W, centre):
        return torch.zeros((), dtype=torch.float64, device=W.device)
    return norms.frobenius(centre.to(W.dtype).double() - centre.double()).square()
