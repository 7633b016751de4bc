"""Accuracy on the new task against what the network still knows, for every method and its interpolations."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import altair as alt

from tethertune.lab.report import drawing, formats
from tethertune.lab.report.drawing import Chart, Figure
from tethertune.lab.report.grouping import Comparison, Group, outcome
from tethertune.lab.report.statistics import Summary, summarise
from tethertune.lab.report.tables import Cell, Table
from tethertune.lab.runs import Run

__all__ = ["Images", "Point", "figures", "images", "points", "tables"]

_BEFORE = 2.0
"""Stands for the place of a run before it was interpolated: before that of its end, which is 1."""

_COLUMNS = ("Method", "Alpha", "Seeds", "Test accuracy", "Retention", "Cross-entropy to the pre-trained answers")
_TEXT = (
    "Retention is the share of the pre-trained network's confident answers, on images that it was not fine-tuned for, "
    "that its original head still gives on the fine-tuned body. A line goes from the fine-tuned network (alpha 1, the "
    "large dot) towards the pre-trained weights; up and to the right is better. Every point is a mean over the seeds, "
    "and every interpolated network is inside the ball, if there is one, for a ball is convex."
)


@dataclass(frozen=True)
class Images:
    """What retention was measured on: so many images, and so many confident answers of the pre-trained network."""

    images: int
    confident: int


@dataclass(frozen=True)
class Point:
    """A group at one interpolation.

    Attributes:
        alpha: 1 for the fine-tuned network, 0 for the pre-trained body; a mean where each run chose its own.
        accuracy: Test accuracy over the seeds.
        retention: Share of the pre-trained answers that stay, over the same seeds.
        cross_entropy: Cross-entropy to those answers, over the same seeds.
    """

    alpha: float
    accuracy: Summary
    retention: Summary
    cross_entropy: Summary


@dataclass(frozen=True)
class _Measurement:
    """One run at one interpolation; the place is 1 for the run as it ended."""

    place: float
    alpha: float
    accuracy: float
    retention: float
    cross_entropy: float
    images: Images


def images(groups: Iterable[Group]) -> Images | None:
    """What most of the measurements of some groups were made on; None if there are none."""
    found = Counter(item.images for group in groups for run in group.runs.values() for item in _measurements(run))
    return max(found, key=lambda key: (found[key], key.images, key.confident), default=None)


def points(group: Group, on: Images) -> list[Point]:
    """The points of a group, by falling alpha; none where retention was not measured on those images."""
    by_place: dict[float, list[_Measurement]] = {}
    for run in group.runs.values():
        for item in _measurements(run):
            if item.images == on:
                by_place.setdefault(item.place, []).append(item)
    return [_point(by_place[place]) for place in sorted(by_place, reverse=True)]


def _point(found: Sequence[_Measurement]) -> Point:
    return Point(
        math.fsum(item.alpha for item in found) / len(found),
        summarise([item.accuracy for item in found]),
        summarise([item.retention for item in found]),
        summarise([item.cross_entropy for item in found]),
    )


def figures(comparison: Comparison) -> list[Figure]:
    """The frontier, if retention was measured."""
    found = _found(comparison)
    if not found:
        return []
    keys = drawing.legend({comparison.labels[group]: group.method for group in found})
    rows = [
        {
            "series": comparison.labels[group],
            "alpha": drawing.significant(point.alpha),
            "retention": drawing.rounded(100 * point.retention.mean),
            "accuracy": drawing.rounded(100 * point.accuracy.mean),
        }
        for group, path in found.items()
        for point in path
    ]
    x = alt.X("retention:Q", title="Retention, %", scale=alt.Scale(zero=False, padding=10), axis=alt.Axis(tickCount=6))
    y = alt.Y("accuracy:Q", title="Test accuracy, %", scale=alt.Scale(zero=False, padding=10))
    tooltip = [alt.Tooltip("series:N", title="method"), "alpha:Q", "retention:Q", "accuracy:Q"]
    bright = alt.condition(drawing.CHOSEN, alt.value(1), alt.value(0.12))
    whole = alt.Chart(drawing.data([row for row in rows if row["alpha"] == 1])).mark_circle(size=110)
    chart = drawing.choosable(
        *drawing.lines(rows, keys, x=x, y=y, tooltip=tooltip, order="alpha:Q"),
        whole.encode(x=x, y=y, color=drawing.tint(keys), opacity=bright, tooltip=tooltip),
    )
    described = "; ".join(f"{comparison.labels[group]} {_told(path)}" for group, path in found.items())
    description = f"Test accuracy against retention, mean over seeds: {described}."
    drawn = Chart("Test accuracy against retention", drawing.spec(chart, description, 340))
    on = images(comparison.groups)
    told = f" It was measured on {on.confident:,} confident answers about {on.images:,} images." if on else ""
    return [Figure("What was forgotten", _TEXT + told, [drawn], _table(comparison, found), keys)]


def tables(comparison: Comparison) -> list[Table]:
    """The same as a table."""
    found = _found(comparison)
    return [_table(comparison, found)] if found else []


def _found(comparison: Comparison) -> dict[Group, list[Point]]:
    on = images(comparison.groups)
    return {group: found for group in comparison.groups if on and (found := points(group, on))}


def _table(comparison: Comparison, found: Mapping[Group, Sequence[Point]]) -> Table:
    rows = [
        [
            Cell(comparison.labels[group], method=group.method),
            Cell(formats.number(point.alpha, ".3g")),
            Cell(str(point.accuracy.count)),
            Cell(formats.spread(point.accuracy)),
            Cell(formats.spread(point.retention)),
            Cell(formats.number(point.cross_entropy.mean, ".2f")),
        ]
        for group, path in found.items()
        for point in path
    ]
    return Table("Test accuracy and retention by interpolation, mean ± standard deviation", _COLUMNS, rows)


def _told(path: Sequence[Point]) -> str:
    return ", ".join(
        f"{formats.accuracy(point.accuracy.mean)} at a retention of {formats.accuracy(point.retention.mean)}"
        f" (alpha {point.alpha:.3g})"
        for point in path
    )


def _measurements(run: Run) -> Iterator[_Measurement]:
    """Every interpolation of a run of which accuracy and retention are known.

    A run that was told what share to keep ended at an alpha of its own, and has a place before that.
    """
    ends = run.info.get("outcome") or {}
    reached = outcome(run, "alpha")
    end = reached if math.isfinite(reached) else 1.0
    taken = {_BEFORE: (1.0, ends.get("before_interpolation")), 1.0: (end, ends)}
    taken |= {float(found["alpha"]): (end * float(found["alpha"]), found) for found in run.interpolations}
    for place, (alpha, found) in taken.items():
        if found and (kept := found.get("retention")):
            values = (found.get("test_accuracy"), kept.get("share"), kept.get("cross_entropy"))
            accuracy, share, entropy = (math.nan if value is None else float(value) for value in values)
            if math.isfinite(accuracy) and math.isfinite(share):
                yield _Measurement(place, alpha, accuracy, share, entropy, Images(kept["images"], kept["confident"]))
