"""The tables of the report, as rows of cells that the HTML and the Markdown template both print."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tethertune.lab.report import formats, movement
from tethertune.lab.report.grouping import FOREMOST, Comparison, Group, Setting, outcome

__all__ = ["Cell", "Table", "held", "results"]


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
    """One row a group: settings, accuracy, and the paired difference to plain fine-tuning in the same setting."""
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
        "Difference by seed",
        "Time a run",
    ]
    rows = [
        _row(comparison, setting, group, others=others) for setting in comparison.settings for group in setting.groups
    ]
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
    difference = comparison.difference(group)
    best = group is comparison.settings[0].best
    clear = difference is not None and difference.beyond_noise
    change = "-"
    if difference is not None and difference.interval is None:
        change = formats.points(difference.mean)
    elif difference is not None:
        change = f"{formats.points(difference.mean)} ({formats.interval(difference)})"
    return [
        Cell(group.method, method=group.method),
        Cell(formats.fields(group.strengths) or "-"),
        Cell(formats.value(setting.fields.get("head"))),
        Cell(_rates(setting)),
        *([Cell(formats.fields({name: setting.fields.get(name) for name in others}))] if others else []),
        Cell(formats.value(list(group.runs))),
        Cell(_accuracy(group), strong=best and clear),
        Cell(change, strong=clear),
        Cell(", ".join(map(formats.points, difference.by_seed.values())) if difference else "-"),
        Cell(formats.duration(_mean_seconds(group))),
    ]


def _accuracy(group: Group) -> str:
    failed = sum(not math.isfinite(value) for value in group.accuracies.values())
    text = formats.spread(group.summary)
    return f"{text} ({failed} of {len(group.runs)} not finite)" if failed else text


def _rates(setting: Setting) -> str:
    body, head = setting.fields.get("lr"), setting.fields.get("head_lr")
    return formats.value(body) if head in (None, body) else f"{formats.value(body)}, head {formats.value(head)}"


def _mean_seconds(group: Group) -> float:
    return sum(outcome(run, "seconds") for run in group.runs.values()) / len(group.runs)
