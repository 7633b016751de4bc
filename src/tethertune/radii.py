"""What a radius may be: a number, a multiple of a layer's own norm, or either by patterns of names."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from tethertune import rows
from tethertune.errors import ConfigurationError
from tethertune.rows import Layer

__all__ = ["Radius", "Relative", "by_name", "require", "to_plain"]


@dataclass(frozen=True)
class Relative:
    """A radius relative to each layer's own reference norm: gamma_j = ratio * ||W0_j||.

    Attributes:
        ratio: At least 0; 0.02 lets every layer move by 2 % of its own norm.
    """

    ratio: float

    def __post_init__(self) -> None:
        require(self.ratio, "Relative(ratio)")


Radius: TypeAlias = float | Relative | Mapping[str, float | Relative]
"""A number for every body layer, a :class:`Relative`, or a mapping from name patterns to either."""


def require(radius: object, argument: str) -> float:
    """A number that is a radius, as a float.

    Raises:
        ConfigurationError: It is none; the message names the argument.
    """
    if isinstance(radius, bool) or not isinstance(radius, int | float) or math.isnan(radius) or radius < 0:
        raise ConfigurationError(
            f"{argument}={radius!r} is not a radius: give a number of at least 0 (0 freezes, math.inf leaves free)."
        )
    return float(radius)


def to_plain(radius: Radius) -> float | dict[str, Any]:
    """The radius as numbers, strings and dicts, which any checkpoint format can hold.

    Raises:
        ConfigurationError: It is no radius, or a mapping that is empty or holds another one.
    """
    if isinstance(radius, Relative):
        return {"relative": radius.ratio}
    if isinstance(radius, Mapping):
        if not radius:
            raise ConfigurationError("radius={} constrains nothing: give at least one pattern, such as {'*': 8.0}.")
        return {"patterns": {p: to_plain(_not_nested(r)) for p, r in radius.items()}}
    return require(radius, "radius")


def _not_nested(radius: Radius) -> Radius:
    if isinstance(radius, Mapping):
        raise ConfigurationError(f"radius={radius!r} inside a mapping: give a number or Relative(ratio) for a pattern.")
    return radius


def by_name(plain: float | dict[str, Any], layers: Sequence[Layer]) -> list[list[float | Relative]]:
    """The radii of each layer: one, or with patterns that of the first that matches, for each of its names.

    Args:
        plain: What :func:`to_plain` returned.
        layers: The layers; one that no pattern matches is free (``math.inf``).

    Raises:
        PatternError: A pattern that matches no layer.
    """
    if isinstance(plain, float) or "relative" in plain:
        return [[_to_radius(plain)] for _ in layers]
    names = [name for layer in layers for name in layer.names]
    hits = {pattern: rows.matching(names, [pattern], "radius") for pattern in plain["patterns"]}
    found = {
        name: _to_radius(next((plain["patterns"][p] for p, hit in hits.items() if name in hit), math.inf))
        for name in names
    }
    return [[found[name] for name in layer.names] for layer in layers]


def _to_radius(plain: float | dict[str, float]) -> float | Relative:
    return Relative(plain["relative"]) if isinstance(plain, dict) else plain
