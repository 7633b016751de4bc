"""What a bound is made from and what it returns, with numbers kept as logarithms.

The bound of a deep network easily passes 10^300, so every number is carried as a logarithm (natural inside the
library, base 10 in results). ``log(0)`` is ``-inf`` and behaves.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tethertune.errors import ConfigurationError

__all__ = ["Bound", "Kind", "Layer", "log", "log_sum", "positive", "to_log10", "to_value"]

Kind = Literal["printed", "certificate", "comparator", "measurement"]
"""What a number may be taken for: as ``printed`` in the paper (not a valid bound); a proven ``certificate``; a
``comparator`` from other papers, constants dropped or not re-derived; or a ``measurement``."""


@dataclass(frozen=True)
class Layer:
    """The class that a layer's weights come from: ``||W|| <= bound``, ``||W - W0|| <= distance``.

    Attributes:
        bound: B_j, of the weights and of the reference; the distance bounds need ``||W0|| + distance`` here.
        distance: D_j; 0 for a layer that is frozen.
    """

    bound: float
    distance: float

    def __post_init__(self) -> None:
        for name, value in (("bound", self.bound), ("distance", self.distance)):
            if not (math.isfinite(value) and value >= 0):
                raise ConfigurationError(f"Layer {name}={value}: it must be a finite number, 0 or more.")


@dataclass(frozen=True)
class Bound:
    """A bound on the Rademacher complexity, or on the generalisation gap where ``about`` says so.

    Attributes:
        name: What it is, with the theorem or equation.
        log10: Its base 10 logarithm; ``-inf`` for 0.
        kind: What it may be taken for.
        is_upper_bound: ``True`` where it is proven to be one for these numbers, ``None`` where that is not known.
        about: ``complexity`` (a gap is twice that, plus the confidence term) or ``gap``.
        parts: Base 10 logarithms of the terms that it is the sum of, where it has any.
    """

    name: str
    log10: float
    kind: Kind
    is_upper_bound: bool | None = None
    about: Literal["complexity", "gap"] = "complexity"
    parts: "tuple[tuple[str, float], ...]" = ()

    @property
    def value(self) -> float | None:
        """The number itself; ``None`` beyond 10^300 and below 10^-300 (0 is 0)."""
        return to_value(self.log10)


def log(value: float) -> float:
    """Natural logarithm with ``log(0) = -inf``."""
    return math.log(value) if value > 0 else -math.inf


def log_sum(terms: Iterable[float]) -> float:
    """``log(sum(exp(term)))`` without overflow; ``-inf`` for no terms."""
    terms = list(terms)
    top = max(terms, default=-math.inf)
    if math.isinf(top):
        return top
    return top + math.log(math.fsum(math.exp(term - top) for term in terms))


def to_log10(natural: float) -> float:
    """A natural logarithm as one of base 10."""
    return natural / math.log(10)


def to_value(log10: float) -> float | None:
    """The number with this logarithm; ``None`` where it is beyond 10^300 or below 10^-300."""
    if log10 == -math.inf:
        return 0.0
    return float(10**log10) if abs(log10) <= 300 else None


def positive(**values: float) -> None:
    """Refuse an argument that is not a finite number above 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigurationError(f"{name}={value}: it must be a finite number above 0.")
