"""How far the layers of the runs moved from the pre-trained weights, and how close to their radius they came."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tethertune.lab.report.grouping import Group
from tethertune.lab.runs import Run

__all__ = ["Bins", "Held", "Histogram", "Layer", "bins", "body", "held", "histogram", "is_relative", "layers", "radii"]

_MARS = "mars"
_LINES = 3  # more distinct radii than this are no lines but a picket fence
_BINS = 24  # about this many bins over the whole range


@dataclass(frozen=True)
class Layer:
    """One body layer at the end of one run.

    Attributes:
        name: Its parameter.
        rows: How many rows it has.
        distances: Its distance from the reference, by norm (``mars``, ``frobenius``).
        references: The norm of its reference weights, by norm.
        norm: In which norm it is constrained; None when it is free.
        radius: Its radius; NaN when it is free.
        value: Its distance as the constraint measures it; NaN when it is free.
        active_rows: How many of its rows are at the radius.
    """

    name: str
    rows: int
    distances: Mapping[str, float]
    references: Mapping[str, float]
    norm: str | None
    radius: float
    value: float
    active_rows: int

    @property
    def is_held(self) -> bool:
        """Whether a finite radius holds the layer."""
        return self.norm is not None and math.isfinite(self.radius)

    @property
    def fullness(self) -> float:
        """Distance divided by radius; of a layer that must not move, 0 or infinity."""
        if self.radius > 0:
            return self.value / self.radius
        return math.inf if self.value > 0 else 0.0

    def distance(self, *, relative: bool) -> float:
        """MARS distance, in units of the reference's MARS norm if relative."""
        return _ratio(self.distances[_MARS], self.references[_MARS]) if relative else self.distances[_MARS]

    def limit(self, *, relative: bool) -> float:
        """Radius in the units of :meth:`distance`."""
        return _ratio(self.radius, self.references[_MARS]) if relative else self.radius


@dataclass(frozen=True)
class Bins:
    """Bins of equal width in the logarithm, with an edge at the anchor.

    Bin i covers the values above ``anchor * 10 ** ((first + i) / per_decade)`` up to that of i + 1, so that a layer at
    its radius falls into the bin below the radius.
    """

    anchor: float
    first: int
    count: int
    per_decade: int

    @property
    def edges(self) -> list[float]:
        """The ``count + 1`` edges, ascending."""
        return [self.anchor * 10 ** ((self.first + place) / self.per_decade) for place in range(self.count + 1)]

    def place(self, value: float) -> int | None:
        """The bin of a value; None for a value that is not positive and finite."""
        return _step(value / self.anchor, self.per_decade) - self.first if _is_on_log_axis(value) else None


@dataclass(frozen=True)
class Histogram:
    """How many layers a run of a group has in each bin of distance, on average over its runs.

    Attributes:
        counts: Layers a run in each bin.
        still: Layers a run that did not move, or whose distance is not finite: a log axis has no place for them.
    """

    counts: Sequence[float]
    still: float


@dataclass(frozen=True)
class Held:
    """How a constraint held the body layers of a group, over all its runs.

    Attributes:
        layers: Constrained layers a run.
        at_radius: Share of them with a row at the radius.
        rows_at_radius: Share of their rows at the radius.
        fullest: Largest distance divided by its radius; at most 1 by the library's promise.
    """

    layers: int
    at_radius: float
    rows_at_radius: float
    fullest: float


def body(run: Run) -> Iterator[Layer]:
    """The body layers of a run that is over; none of one that diverged."""
    for name, record in run.distances.get("layers", {}).items():
        if record["role"] == "body":
            yield Layer(
                name,
                record["rows"],
                {norm: _number(record[norm]) for norm in ("mars", "frobenius")},
                {norm: _number(record[f"reference_{norm}"]) for norm in ("mars", "frobenius")},
                record["norm"],
                _number(record["radius"]),
                _number(record["value"]),
                record["active_rows"] or 0,
            )


def is_relative(groups: Iterable[Group]) -> bool:
    """Whether distances are better shown relative to each layer's own norm: radii are one number only that way."""
    balls = [[layer for layer in layers(group) if layer.is_held and layer.norm == _MARS] for group in groups]
    return any(
        len(_merge(layer.limit(relative=True) for layer in ball)) == 1
        and len(_merge(layer.limit(relative=False) for layer in ball)) > 1
        for ball in balls
    )


def radii(group: Group, *, relative: bool) -> list[float]:
    """The MARS radii of a group's layers, ascending; empty when there is none, or too many to draw."""
    limits = [layer.limit(relative=relative) for layer in layers(group) if layer.is_held and layer.norm == _MARS]
    merged = _merge(limit for limit in limits if limit > 0)
    return merged if len(merged) <= _LINES else []


def bins(values: Iterable[float], *, anchor: float = 1.0) -> Bins | None:
    """Bins that cover all positive finite values; None when there is no such value."""
    known = list(filter(_is_on_log_axis, values))
    if not known:
        return None
    decades = math.log10(max(known) / min(known))
    per_decade = max(2, min(16, round(_BINS / max(decades, 1))))
    first, last = (_step(value / anchor, per_decade) for value in (min(known), max(known)))
    return Bins(anchor, first, last - first + 1, per_decade)


def histogram(group: Group, bins: Bins, *, relative: bool) -> Histogram:
    """Layers in each bin, on average over the runs of a group."""
    places = Counter(bins.place(layer.distance(relative=relative)) for layer in layers(group))
    runs = len(group.runs)
    return Histogram([places[place] / runs for place in range(bins.count)], places[None] / runs)


def held(group: Group) -> Held | None:
    """How the constraint of a group held; None when no layer was constrained."""
    constrained = [layer for layer in layers(group) if layer.is_held]
    if not constrained:
        return None
    return Held(
        layers=round(len(constrained) / len(group.runs)),
        at_radius=sum(layer.active_rows > 0 for layer in constrained) / len(constrained),
        rows_at_radius=sum(layer.active_rows for layer in constrained) / sum(layer.rows for layer in constrained),
        fullest=max(layer.fullness for layer in constrained),
    )


def layers(group: Group) -> Iterator[Layer]:
    """The body layers of all runs of a group, run after run."""
    for run in group.runs.values():
        yield from body(run)


def _number(value: Any) -> float:
    """A number of a JSON document, where NaN is null and an infinity is a word."""
    return math.nan if value is None else float(value)


def _is_on_log_axis(value: float) -> bool:
    return value > 0 and math.isfinite(value)


def _step(ratio: float, per_decade: int) -> int:
    """The bin, counted from the anchor, whose upper edge is at the ratio or above it, up to rounding."""
    return math.ceil(math.log10(ratio) * per_decade - 1e-3) - 1


def _ratio(value: float, unit: float) -> float:
    return value / unit if unit > 0 else math.nan


def _merge(values: Iterable[float]) -> list[float]:
    """The finite values, ascending, those that differ by rounding (one part in 10,000) counted once."""
    merged: list[float] = []
    for value in sorted(filter(math.isfinite, values)):
        if not merged or value > merged[-1] * (1 + 1e-4):
            merged.append(value)
    return merged
