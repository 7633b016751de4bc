"""Radii for classes that were not declared in advance: cells of a grid that was.

Uniform convergence holds for one class that is fixed before the data are seen. A radius that is only known after
training is rounded up to a grid of radii ``scale * ratio^k``, fixed in advance with weights that sum to one; using a
cell of weight w costs ``log(1/w)`` nats of confidence (a union bound over the grid).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tethertune.errors import ConfigurationError
from tethertune.theory.bounds import positive

__all__ = ["RATIO", "SMALLEST", "Cell", "cover", "cover_together", "weight"]

RATIO = 1.1
"""Each radius of the grid is this times the one before it."""
SMALLEST = 1e-6
"""Distances below this part of their scale are taken for it, so that the grid's index stays small."""


@dataclass(frozen=True)
class Cell:
    """One radius of the grid.

    Attributes:
        index: k.
        radius: ``scale * ratio^k``.
        weight: Its share of the probability of failure.
    """

    index: int
    radius: float
    weight: float

    @property
    def price(self) -> float:
        """``log(1 / weight)`` in nats."""
        return -math.log(self.weight)


def weight(index: int) -> float:
    """``2 / (3 (|k| + 1) (|k| + 2))``; over all integers they sum to 1."""
    k = abs(index)
    return 2 / (3 * (k + 1) * (k + 2))


def cover(value: float, scale: float = 1.0, *, ratio: float = RATIO) -> Cell:
    """The smallest cell of the grid that holds a value.

    Args:
        value: The radius that is needed.
        scale: The grid's radius at index 0, known before the data.
        ratio: Step of the grid.

    Raises:
        ConfigurationError: A value that is not finite, a scale or ratio that makes no grid.

    Example:
        >>> cover(3.0, 2.0).index, round(cover(3.0, 2.0).radius, 5)
        (5, 3.22102)
    """
    return cover_together([value], [scale], ratio=ratio)[0]


def cover_together(values: Sequence[float], scales: Sequence[float], *, ratio: float = RATIO) -> list[Cell]:
    """One index for all values, each with its own scale: the price is that of one cell, not of one for each value."""
    positive(ratio=ratio, **{f"scales[{j}]": scale for j, scale in enumerate(scales)})
    if ratio <= 1:
        raise ConfigurationError(f"ratio={ratio}: the grid's ratio must be above 1.")
    index = max((_index(value, scale, ratio) for value, scale in zip(values, scales, strict=True)), default=0)
    return [Cell(index, scale * ratio**index, weight(index)) for scale in scales]


def _index(value: float, scale: float, ratio: float) -> int:
    if not math.isfinite(value) or value < 0:
        raise ConfigurationError(f"{value} cannot be covered by a grid of radii: it must be finite and 0 or more.")
    value = max(value, SMALLEST * scale)
    index = math.ceil(math.log(value / scale) / math.log(ratio) - 1e-12)
    while scale * ratio**index < value:
        index += 1
    return index
