"""Weights and centre as matrices whose rows are stretches of memory: the form that compiled kernels take."""

import math
from typing import NamedTuple

from torch import Tensor

from tethertune.kernels.chunked import gapless_rows

__all__ = ["Stretches", "as_stretches"]


class Stretches(NamedTuple):
    """Rows of a weight as they lie in memory, and their ball.

    Attributes:
        weight: (rows, columns), each row without gaps; writing to it changes the model.
        centre: Of the same shape, its rows in the same order of columns; ``None`` for 0.
        radius: Float64, contiguous, read at every step: of each row, (rows,), or of the layer, (1,), for a Frobenius
            ball, whose rows do not matter.
        size: The largest norm of a row of the centre, or that of the whole centre for a Frobenius ball; ``math.inf``
            where it is not known.
    """

    weight: Tensor
    centre: Tensor | None
    radius: Tensor
    size: float = math.inf


def as_stretches(weight: Tensor, centre: Tensor, radius: Tensor, *, size: float, by_row: bool) -> Stretches | None:
    """The weights of a block as stretches of memory; ``None`` where its rows have gaps or another order in the centre.

    Args:
        weight: Stored weights whose axis 0 numbers the rows, not empty.
        centre: Their reference, of the same shape; a 0 expanded to it is taken as none.
        radius: Of each row, float64, (rows,).
        size: The largest norm of the centre that a ball has.
        by_row: Whether each row has a ball; otherwise the layer has one, and all of it is one row if it has no gaps.
    """
    rows, columns = len(weight), weight.numel() // len(weight)
    constant = not any(centre.stride())
    if not gapless_rows(weight, columns) or (constant and bool(centre[(0,) * centre.ndim])):
        return None
    if not constant and _order(weight) != _order(centre):
        return None
    steps = [weight.stride(0), columns if constant else centre.stride(0)]
    if not by_row and (rows == 1 or steps == [columns, columns]):
        rows, columns, steps = 1, weight.numel(), [weight.numel()] * 2
    return Stretches(
        weight.as_strided((rows, columns), (steps[0], 1)),
        None if constant else centre.as_strided((rows, columns), (steps[1], 1)),
        radius.contiguous() if by_row else radius[:1],
        size,
    )


def _order(tensor: Tensor) -> list[int]:
    """The steps in memory along a row; those of axes of one entry mean nothing."""
    return [step for step, size in zip(tensor.stride()[1:], tensor.shape[1:], strict=True) if size > 1]
