"""The tables of the report, as rows of cells that the HTML and the Markdown template both print."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tethertune.lab.report import formats, movement
from tethertune.lab.report.grouping import FOREMOST, Comparison, Group, Setting, outcome
from tethertune.lab.report.statistics import Difference

__all__ = ["DIVERGED", "Cell", "Table", "accuracy", "held", "results"]

DIVERGED = "every trial diverged"
"""What stands in place of the accuracy of a method for which a search found no values that train."""


@dataclass(frozen=True)
class Cell:
    """A table cell.

    Attributes:
        text: What it says.
        strong: Whether it is the one to look at.
        method: The method whose colour marks it, if any.
    """

    text: str
    strong: bool = False
    method: str | None = None


@dataclass(frozen=True)
class Table:
    """A table with a caption, column heads, and rows whose first cell is the row's head."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def results(comparison: Comparison) -> Table:
    """One row a group: settings, accuracy, and the paired differences to plain fine-tuning and to the best rival."""
    others = [name for name in comparison.varying if name not in FOREMOST]
    columns = [
        "Method",
        "Radius or strength",
        "Head",
        "Learning rate",
        *(["Else"] if others else []),
        "Seeds",
        "Test accuracy",
        "Difference to none (95 % interval)",
        "To the best other (95 % interval)",
        "Difference by seed",
        "Time a run",
    ]
    rows = [
        _row(comparison, setting, group, others=others) for setting in comparison.settings for group in setting.groups
    ]
    rows += [_lost(method, columns) for method in comparison.lost]
    return Table(f"Test accuracy of {comparison.model} on {comparison.dataset}", columns, rows)


def held(comparison: Comparison) -> Table | None:
    """One row a constrained group: how many of its layers ended at their radius, and that none is beyond it."""
    rows = [
        [
            Cell(comparison.labels[group], method=group.method),
            Cell(str(found.layers)),
            Cell(f"{formats.share(found.at_radius)} %"),
            Cell(f"{formats.share(found.rows_at_radius)} %"),
            Cell(formats.number(found.fullest, ".6f")),
        ]
        for group in comparison.groups
        if (found := movement.held(group))
    ]
    columns = ("Method", "Constrained layers", "Layers at radius", "Rows at radius", "Largest distance / radius")
    return Table("Constrained body layers at the end of training", columns, rows) if rows else None


def _row(comparison: Comparison, setting: Setting, group: Group, *, others: Sequence[str]) -> list[Cell]:
    difference, rival = comparison.difference(group), setting.rival(group)
    lead = group.minus(rival) if rival else None
    return [
        Cell(group.method, method=group.method),
        Cell(formats.fields(group.strengths) or "-"),
        Cell(formats.value(setting.fields.get("head"))),
        Cell(_rates(group)),
        *([Cell(formats.fields({name: setting.fields.get(name) for name in others}))] if others else []),
        Cell(formats.value(list(group.runs))),
        Cell(accuracy(group), strong=comparison.is_clear_winner(group)),
        _change(difference),
        _change(lead, f" to {rival.method}" if rival else ""),
        Cell(", ".join(map(formats.points, difference.by_seed.values())) if difference else "-"),
        Cell(formats.duration(_mean_seconds(group))),
    ]


def _lost(method: str, columns: Sequence[str]) -> list[Cell]:
    told = {"Method": Cell(method, method=method), "Test accuracy": Cell(DIVERGED)}
    return [told.get(column, Cell("-")) for column in columns]


def accuracy(group: Group) -> str:
    """Mean and deviation of a group's test accuracy; how many of its runs have none."""
    failed = sum(not math.isfinite(value) for value in group.accuracies.values())
    text = formats.spread(group.summary)
    return f"{text} ({failed} of {len(group.runs)} not finite)" if failed else text


def _change(difference: Difference | None, to: str = "") -> Cell:
    if difference is None:
        return Cell("-")
    told = f" ({formats.interval(difference)})" if difference.interval else ""
    return Cell(f"{formats.points(difference.mean)}{told}{to}", strong=difference.beyond_noise)


def _rates(group: Group) -> str:
    body, head = group.rates.get("lr"), group.rates.get("head_lr")
    return formats.value(body) if head in (None, body) else f"{formats.value(body)}, head {formats.value(head)}"


def _mean_seconds(group: Group) -> float:
    return sum(outcome(run, "seconds") for run in group.runs.values()) / len(group.runs)
