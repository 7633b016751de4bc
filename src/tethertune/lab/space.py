"""What a search tries: ranges of a method's hyper-parameters and of the learning rate, and how it chooses from them.

Imports nothing heavy, because the command line reads it for ``--help``.
"""

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from math import exp, inf, log
from typing import Any, Literal

from tethertune.errors import ConfigurationError
from tethertune.lab.config import COUNT, SEED, Range, faults_of_fields, make_plain
from tethertune.lab.methods import METHODS, HyperParameter, Method

__all__ = ["Dimension", "Movement", "SearchConfig", "Space", "needs_movement", "require_free", "space", "tuned_keys"]

Kind = Literal["authors", "v1", "relative", "auto"]

LR_RANGE = (1e-4, 1e-3)
"""Of Adam, for networks that are fine-tuned: from the paper's rate to where plain fine-tuning on few images diverges.
Its middle, on the logarithmic scale, is the default."""


@dataclass(frozen=True)
class SearchConfig:
    """How a search chooses. A value that is not allowed is a :exc:`ConfigurationError`."""

    trials: int = 20
    """Runs that the search makes, 1 or more. More may be asked of a finished study."""

    sampler: Literal["tpe", "random", "gp"] = "tpe"
    """What proposes: tpe (tree-structured Parzen estimator), random, or gp (Gaussian process)."""

    startup: int = 5
    """Trials at the start that are random whatever the sampler, 1 or more."""

    space: Kind = "authors"
    """Ranges: authors, v1 (of the paper's first version), relative (to each layer's norm), or auto (from one epoch)."""

    tune_lr: bool = False
    """Search the learning rate too, for every method, none included."""

    lr_range: tuple[float, float] = LR_RANGE
    """Lowest and highest learning rate that is tried, above 0."""

    objective: Literal["accuracy", "loss"] = "accuracy"
    """What is best: the highest accuracy, or the lowest loss, on the validation images after the last epoch."""

    prune: bool = False
    """Stop a trial that is worse than the median of earlier ones at the same epoch."""

    seed: int = 0
    """Seed of the proposals, from 0 to 2^32 - 1."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigurationError: All faults, one a line.
        """
        make_plain(self)
        faults = list(faults_of_fields(self, _RANGES))
        if self.sampler == "gp" and self.prune:
            faults.append("--prune goes with --sampler tpe or random: gp learns nothing from trials that are stopped.")
        if faults:
            raise ConfigurationError("\n".join(faults))

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that change what is proposed, as plain JSON values: all but the number of trials."""
        return {key: value for key, value in asdict(self).items() if key != "trials"} | {"lr_range": [*self.lr_range]}


_RANGES: dict[str, Range] = {
    "trials": COUNT,
    "startup": COUNT,
    "lr_range": (lambda ends: 0 < ends[0] < ends[1] < inf, "use two numbers above 0, the lower one first"),
    "seed": SEED,
}


@dataclass(frozen=True)
class Dimension:
    """One number that is searched, log-uniformly.

    Attributes:
        key: The configuration key.
        low: The lowest value.
        high: The highest value.
    """

    key: str
    low: float
    high: float

    def edge(self, value: float) -> Literal["lower", "upper"] | None:
        """The end of the range that a value lies at: within a twentieth of it, on the logarithmic scale."""
        place = log(value / self.low) / log(self.high / self.low)
        return "lower" if place < 0.05 else "upper" if place > 0.95 else None


Space = tuple[Dimension, ...]


@dataclass(frozen=True)
class Movement:
    """How far one epoch without a constraint went, in the norm of the method.

    Attributes:
        median: The distance of the body's layer in the middle.
        largest: The distance of the body's layer that moved most.
        head: The norm of the head's weights.
    """

    median: float
    largest: float
    head: float


def space(
    method: str,
    *,
    kind: Kind = "authors",
    tune_lr: bool = False,
    lr_range: tuple[float, float] = LR_RANGE,
    head: Literal["pool", "flatten"] = "pool",
    movement: Movement | None = None,
) -> Space:
    """What is searched for a method: its value for the body, its value for the head, and the learning rate.

    - ``authors``: the ranges that the paper's authors searched in the end, exp(0.5) to exp(3.5) for radii and exp(-10)
      to exp(-1) for strengths. ``v1``: those of the paper's first version, exp(0.5) to exp(2.5) for radii.
    - ``relative``: the body's radius as a multiple of each layer's norm, from 0.002 to 0.2. In short runs with few
      images 0.02 did best, and nothing moved further than 0.13 of its norm. The head's from 1 to 30 in the MARS norm,
      from 0.1 to 10 in the Frobenius norm, which is smaller; 3 and 0.3 did best with ten classes.
    - ``auto``: from what one epoch without a constraint did. The body's radius from a tenth of how far the layer in
      the middle moved to how far the one that moved most did: below, little can be learnt, above, nothing binds for
      long. The head's around its norm after that epoch: from a tenth to ten times if it began at zero, because it goes
      on growing; from a hundredth to once if it began at random, because there what a ball does is shrink it. On ten
      images a class of Fashion-MNIST that is 0.014 to 1.6 and, for the flattened head, 0.88 to 88.
    - Strengths have no such scale: ``relative`` and ``auto`` keep the authors' ranges. Only DELTA's, which with this
      project's attention did best at 3, beyond the authors' range, is then searched from 0.01 to 10.

    Args:
        method: Its name.
        kind: Where the ranges come from.
        tune_lr: Search the learning rate too.
        lr_range: Its range.
        head: How the head begins: ``"pool"`` at zero, ``"flatten"`` at random.
        movement: For ``"auto"``, where :func:`needs_movement` says so.
    """
    found = METHODS[method]
    rate = (Dimension("lr", *lr_range),) if tune_lr else ()
    return (*_of_method(found, kind, head, movement), *rate)


def needs_movement(method: str, kind: Kind) -> bool:
    """Whether the ranges depend on what an epoch without a constraint does."""
    return kind == "auto" and METHODS[method].kind == "constraint"


def tuned_keys(method: str, *, tune_lr: bool) -> tuple[str, ...]:
    """The configuration keys that a search chooses or clears, and that cannot be given beside it."""
    return (*METHODS[method].accepts, *(("lr",) if tune_lr else ()))


def require_free(given: Collection[str], method: str, settings: SearchConfig) -> None:
    """Check that nothing is given which the search chooses.

    Args:
        given: Configuration keys.
        method: The name of the method.
        settings: The search.

    Raises:
        ConfigurationError: Something is.
    """
    chosen = [key for key in tuned_keys(method, tune_lr=settings.tune_lr) if key in given]
    if chosen:
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in chosen)
        raise ConfigurationError(
            f"{flags}: the search chooses that, so leave it out. --space sets the ranges of hyper-parameters,"
            " --lr-range that of the learning rate."
        )


def _of_method(method: Method, kind: Kind, head: str, movement: Movement | None) -> Iterator[Dimension]:
    if method.body is None or method.head is None:
        return
    if method.kind != "constraint":
        yield _WIDE_DELTA if method.kind == "features" and kind in ("relative", "auto") else _dimension(method.body)
        yield _dimension(method.head)
    elif kind == "relative":
        yield Dimension("relative_radius", 0.002, 0.2)
        yield Dimension("head_radius", *((1.0, 30.0) if method.norm == "mars" else (0.1, 10.0)))
    elif kind == "auto":
        assert movement is not None
        yield Dimension("radius", _short(0.1 * movement.median), _short(movement.largest))
        below, above = (0.1, 10) if head == "pool" else (0.01, 1)
        yield Dimension("head_radius", _short(below * movement.head), _short(above * movement.head))
    else:
        for parameter in (method.body, method.head):
            yield Dimension(parameter.name, parameter.low, exp(2.5) if kind == "v1" else parameter.high)


def _dimension(parameter: HyperParameter) -> Dimension:
    return Dimension(parameter.name, parameter.low, parameter.high)


_WIDE_DELTA = Dimension("strength", 0.01, 10.0)


def _short(value: float) -> float:
    """Two significant digits: a range is no more exact, and on another machine it is the same."""
    return float(f"{value:.2g}")
