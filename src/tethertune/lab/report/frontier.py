"""Accuracy on the new task against what the network still knows, for every method and its interpolations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from tethertune.lab.report import drawing, formats
from tethertune.lab.report.drawing import Chart, Figure
from tethertune.lab.report.grouping import Comparison, Group, outcome
from tethertune.lab.report.statistics import Summary, summarise
from tethertune.lab.report.tables import Cell, Table
from tethertune.lab.runs import Run

__all__ = ["Point", "figures", "points", "tables"]

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


def points(group: Group) -> list[Point]:
    """The points of a group, by falling alpha; none where retention was not measured."""
    by_place: dict[float, list[tuple[float, ...]]] = {}
    for run in group.runs.values():
        for place, figures in _measured(run).items():
            by_place.setdefault(place, []).append(figures)
    made = []
    for place in sorted(by_place, reverse=True):
        alphas, *measures = zip(*by_place[place], strict=True)
        made.append(Point(math.fsum(alphas) / len(alphas), *map(summarise, measures)))
    return made


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
    told = "; ".join(f"{comparison.labels[group]} {_told(path)}" for group, path in found.items())
    description = f"Test accuracy against retention, mean over seeds: {told}."
    drawn = Chart("Test accuracy against retention", drawing.spec(chart, description, 340))
    return [Figure("What was forgotten", _TEXT, [drawn], _table(comparison, found), keys)]


def tables(comparison: Comparison) -> list[Table]:
    """The same as a table."""
    found = _found(comparison)
    return [_table(comparison, found)] if found else []


def _found(comparison: Comparison) -> dict[Group, list[Point]]:
    return {group: found for group in comparison.groups if (found := points(group))}


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


def _measured(run: Run) -> dict[float, tuple[float, ...]]:
    """Alpha, accuracy, retention and cross-entropy of a run at each place: 1 is the run as it ended.

    A run that was told what share to keep ended at an alpha of its own, and has a place before that.
    """
    ends = run.info.get("outcome") or {}
    reached = outcome(run, "alpha")
    end = reached if math.isfinite(reached) else 1.0
    taken = {_BEFORE: (1.0, ends.get("before_interpolation")), 1.0: (end, ends)}
    taken |= {float(found["alpha"]): (end * float(found["alpha"]), found) for found in run.interpolations}
    return {place: (alpha, *figures) for place, (alpha, found) in taken.items() if (figures := _figures(found))}


def _figures(found: Mapping[str, Any] | None) -> tuple[float, ...]:
    """Accuracy, retention and cross-entropy; empty where one of the first two is missing or not finite."""
    if not found or not found.get("retention") or found.get("test_accuracy") is None:
        return ()
    retention = found["retention"]
    numbers = (found["test_accuracy"], retention.get("share"), retention.get("cross_entropy"))
    figures = tuple(math.nan if number is None else float(number) for number in numbers)
    return figures if all(map(math.isfinite, figures[:2])) else ()
