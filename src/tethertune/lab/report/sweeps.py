"""How much depends on a value: accuracy with radii, strengths or a learning rate away from the chosen ones."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tethertune.lab.report import curves, drawing
from tethertune.lab.report.curves import Axis, Measure, Path
from tethertune.lab.report.drawing import Figure
from tethertune.lab.report.grouping import STRENGTHS, Comparison, identity, is_over, outcome, part, rank
from tethertune.lab.report.statistics import summarise
from tethertune.lab.report.tables import Table
from tethertune.lab.runs import Run

__all__ = ["figures", "tables"]

_ACCURACY = Measure("Test accuracy")


@dataclass(frozen=True)
class _Kind:
    """One kind of sweep: the axis that it runs over, and what is written above and below its figure."""

    axis: Axis
    title: str
    text: str


_KINDS = {
    "strengths": _Kind(
        Axis("multiplier of the chosen values", log=True),
        "How much depends on the radius or strength",
        "Both values of a method, of the body and of the head, times the same factor; at 1 stand the results.",
    ),
    "lr": _Kind(
        Axis("learning rate", log=True),
        "How much depends on the learning rate",
        "Everything else as in the results, which stand on the line at their own learning rate.",
    ),
}
_BAND = " The band is one standard deviation over the seeds each way. A value at which a run diverged has no dot."


@dataclass(frozen=True)
class _Line:
    """The accuracies of one method at each value of a sweep, by seed."""

    label: str
    method: str
    accuracies: Mapping[float, Mapping[int, float]]

    @property
    def path(self) -> Path:
        return {value: summarise(list(self.accuracies[value].values())) for value in sorted(self.accuracies)}


def figures(comparison: Comparison) -> list[Figure]:
    """A figure for each kind of sweep that was made."""
    return [_figure(key, lines) for key in _KINDS if (lines := _lines(comparison, key))]


def tables(comparison: Comparison) -> list[Table]:
    """The same as tables."""
    return [_table(key, lines) for key in _KINDS if (lines := _lines(comparison, key))]


def _figure(key: str, lines: Sequence[_Line]) -> Figure:
    kind = _KINDS[key]
    keys = drawing.legend({line.label: line.method for line in lines})
    told = "; ".join(f"{line.label} {_told(line.path)}" for line in lines)
    chart = curves.curve(kind.axis, _ACCURACY, {line.label: line.path for line in lines}, keys, told)
    return Figure(kind.title, kind.text + _BAND, [chart] if chart else [], _table(key, lines), keys)


def _table(key: str, lines: Sequence[_Line]) -> Table:
    axis = _KINDS[key].axis
    columns = [(line.label, _ACCURACY, line.path) for line in lines]
    return curves.table(f"Test accuracy in percent by {axis.name}, mean ± standard deviation", axis, columns)


def _told(path: Path) -> str:
    return ", ".join(f"{_ACCURACY.text(summary)} % at {value:g}" for value, summary in path.items())


def _lines(comparison: Comparison, key: str) -> list[_Line]:
    """A line for each method, or for each of its configurations; none where nothing was swept."""
    swept: dict[str, list[Run]] = defaultdict(list)
    for run in comparison.sweeps:
        if part(run)["key"] == key and is_over(run):
            swept[_apart(run, key, float(part(run)["value"]))].append(run)
    lines = []
    for apart, runs in swept.items():
        accuracies: dict[float, dict[int, float]] = defaultdict(dict)
        for run in runs:
            accuracies[float(part(run)["value"])][_seed(run)] = outcome(run, "test_accuracy")
        label = method = runs[0].info["config"]["method"]
        for group in comparison.groups:
            first = next(iter(group.runs.values()))
            value = float(group.rates["lr"]) if key == "lr" else 1.0
            if _apart(first, key, value) == apart:
                accuracies[value] |= group.accuracies
                label = comparison.labels[group]
        lines.append(_Line(label, method, accuracies))
    return _told_apart(sorted(lines, key=lambda line: (rank(line.method), line.label)))


def _told_apart(lines: Sequence[_Line]) -> list[_Line]:
    """The lines with a number after a label that an earlier one has."""
    labels: list[str] = []
    for line in lines:
        same = sum(label == line.label or label.startswith(f"{line.label} #") for label in labels)
        labels.append(f"{line.label} #{same + 1}" if same else line.label)
    return [_Line(label, line.method, line.accuracies) for label, line in zip(labels, lines, strict=True)]


def _apart(run: Run, key: str, value: float) -> str:
    """What tells a run from those of other lines: all but its seed and the swept value, as text."""
    made: dict[str, Any] = identity(run)
    if key == "lr":
        del made["lr"]
    else:
        made |= {name: f"{float(made[name]) / value:.6g}" for name in STRENGTHS if made[name] is not None}
    return json.dumps(made, sort_keys=True, default=str)


def _seed(run: Run) -> int:
    seed: int = run.info["config"]["seed"]
    return seed
