r"""From a real projection to stored numbers: rounding that cannot leave the ball.

Rounding to nearest moves each weight by at most half a unit in the last place, and about half of all projected rows
end outside by a few of them. In float32 that is :math:`10^{-7}` of the radius; in bfloat16 it is up to some percent.
So the result is rounded to nearest, measured, and where it is outside, just enough of its weights are moved by ONE
unit in the last place towards the centre. One pass always suffices: a weight moved towards the centre after rounding
to nearest is at least as near to it as the unrounded weight was, and the unrounded row was inside.
"""

import torch
from torch import Tensor

__all__ = ["MARGIN", "fit", "step_towards"]

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
        centre: The centre, float64, of the same shape.
        budget: The largest allowed :math:`\sum_i |W_{ri} - c_{ri}|^p` a row, float64, (rows,).
        power: p, 1 for the l1 norm of rows or 2 for the squared Frobenius norm.

    Returns:
        The weights, of the shape and dtype of ``W``.
    """
    size = (W.double() - centre).abs() ** power
    closer = step_towards(W, centre)
    gain = (size - (closer.double() - centre).abs() ** power).clamp_(min=0)
    excess = size.sum(dim=1) - budget
    gained_before = gain.cumsum(dim=1) - gain
    taken = (gained_before < excess.unsqueeze(1)) & (gain > 0)
    return torch.where(taken, closer, W)
