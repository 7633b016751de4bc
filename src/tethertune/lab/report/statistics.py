"""Means, deviations and paired differences with bootstrap intervals, as pure functions of numbers.

Accuracies of one seed share their training images, so methods are compared seed by seed: the scatter that all methods
have in common cancels, and what is left is the difference between the methods.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "ENOUGH",
    "LEVEL",
    "Difference",
    "Summary",
    "bootstrap_interval",
    "mean_difference",
    "paired",
    "ranks",
    "summarise",
]

ENOUGH = 3
"""With fewer differences than this nothing is said to be more than noise."""

LEVEL = 0.95
"""The nominal level of every interval."""


@dataclass(frozen=True)
class Summary:
    """Mean and scatter of some values.

    Attributes:
        mean: The arithmetic mean; NaN without values, or when one of them is not finite.
        deviation: The sample standard deviation (divisor n - 1); NaN with fewer than two values.
        count: How many values there were.
    """

    mean: float
    deviation: float
    count: int


@dataclass(frozen=True)
class Difference:
    """Ours minus theirs on the seeds, or the tasks, that both have.

    Attributes:
        by_seed: The difference of each common seed (or task, by its number), ascending.
        mean: Their mean.
        interval: The bootstrap interval of the mean; None with one seed, or when a difference is not finite.
    """

    by_seed: Mapping[int, float]
    mean: float
    interval: tuple[float, float] | None

    @property
    def leaves_out_zero(self) -> bool:
        """Whether there is an interval and 0 is outside it."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)

    @property
    def beyond_noise(self) -> bool:
        """Whether 0 is outside the interval of three seeds or more; that of two misses the truth half the time."""
        return self.leaves_out_zero and len(self.by_seed) >= ENOUGH


def summarise(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation; a value that is not finite makes both NaN."""
    count = len(values)
    if count == 0 or not all(map(math.isfinite, values)):
        return Summary(math.nan, math.nan, count)
    mean = math.fsum(values) / count
    if count == 1:
        return Summary(mean, math.nan, count)
    return Summary(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1)), count)


def bootstrap_interval(
    values: Sequence[float], *, level: float = LEVEL, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean (Efron, 1979).

    With two or three values and a level of 95 % it is their range, and with a handful it is too narrow: a resample
    cannot hold what was never drawn.

    Args:
        values: At least one finite value.
        level: The nominal level, in (0, 1).
        resamples: How often as many values are drawn with replacement.
        seed: Of the drawing; the same values and seed give the same interval.
    """
    sample = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(sample), size=(resamples, len(sample)))
    tail = (1 - level) / 2
    low, high = np.quantile(sample[drawn].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Ours minus theirs, seed by seed; None when no seed is common.

    Args:
        ours: A value for each seed.
        theirs: Likewise, of what ours is compared with.
    """
    return mean_difference({seed: ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()})


def mean_difference(by_seed: Mapping[int, float]) -> Difference | None:
    """The mean of differences and its interval; None without differences.

    Args:
        by_seed: A difference for each seed, or for each task.
    """
    if not by_seed:
        return None
    ordered = dict(sorted(by_seed.items()))
    differences = list(ordered.values())
    mean = summarise(differences).mean
    known = len(differences) > 1 and math.isfinite(mean)
    return Difference(ordered, mean, bootstrap_interval(differences) if known else None)


def ranks(values: Mapping[str, float]) -> dict[str, float]:
    """The rank of each value, 1 for the highest; equal values share the mean of the ranks that they take up.

    Args:
        values: Finite values by name.

    Example:
        >>> ranks({"a": 0.5, "b": 0.7, "c": 0.5})
        {'a': 2.5, 'b': 1.0, 'c': 2.5}
    """
    return {
        name: 1 + sum(other > value for other in values.values()) + (list(values.values()).count(value) - 1) / 2
        for name, value in values.items()
    }
