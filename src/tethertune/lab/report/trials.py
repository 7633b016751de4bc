"""What the searches tried: validation accuracy against each value that was tuned, and the best trial of each search."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from tethertune.lab.report import drawing, formats
from tethertune.lab.report.drawing import Chart, Figure
from tethertune.lab.report.grouping import STRENGTHS, Comparison, is_over, outcome, part, rank
from tethertune.lab.report.tables import Cell, Table
from tethertune.lab.runs import Run

__all__ = ["figures", "tables"]

_TUNED = (*STRENGTHS, "lr")
_COLUMNS = ("Method", "Trials", "Best validation accuracy", "Its values", "Study")
_TEXT = (
    "Every dot is a trial of a search, which trained on the training images alone and never looked at the test images. "
    "The trials are in no mean."
)


@dataclass(frozen=True)
class _Study:
    """The trials of one method in one search."""

    name: str
    method: str
    runs: Sequence[Run]

    @property
    def tuned(self) -> list[str]:
        """The configuration names whose value differs between the trials."""
        return [name for name in _TUNED if len({_value(run, name) for run in self.runs}) > 1]

    @property
    def best(self) -> Run | None:
        """The trial of the highest validation accuracy."""
        done = [run for run in self.runs if math.isfinite(_validated(run))]
        return max(done, key=_validated, default=None)


def figures(comparison: Comparison) -> list[Figure]:
    """A chart for each tuned value, if there were trials."""
    studies = _studies(comparison)
    names = [name for name in _TUNED if any(name in study.tuned for study in studies)]
    charts = [chart for name in names if (chart := _chart(name, studies))]
    if not charts:
        return []
    keys = drawing.legend({study.method: study.method for study in studies})
    return [Figure("What the search tried", _TEXT, charts, _table(studies), keys)]


def tables(comparison: Comparison) -> list[Table]:
    """The best trial of each search, if there were trials."""
    studies = _studies(comparison)
    return [_table(studies)] if studies else []


def _studies(comparison: Comparison) -> list[_Study]:
    sorted_out: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in comparison.trials:
        sorted_out[run.info["config"]["method"], str(part(run)["study"])].append(run)
    studies = [
        _Study(name, method, sorted(runs, key=lambda run: part(run)["number"]))
        for (method, name), runs in sorted_out.items()
    ]
    return sorted(studies, key=lambda study: (rank(study.method), study.name))


def _chart(name: str, studies: Sequence[_Study]) -> Chart | None:
    rows = [
        {
            "series": study.method,
            "value": drawing.significant(value),
            "accuracy": drawing.rounded(100 * _validated(run)),
            "trial": part(run)["number"],
        }
        for study in studies
        if name in study.tuned
        for run in study.runs
        if math.isfinite(_validated(run)) and 0 < (value := _value(run, name)) < math.inf
    ]
    if not rows:
        return None
    title = formats.name(name)
    scale = alt.Scale(type="log", nice=False, padding=8)
    x = alt.X("value:Q", title=title, scale=scale, axis=alt.Axis(format="~g", tickCount=5, grid=False))
    y = alt.Y("accuracy:Q", title="Validation accuracy, %", scale=alt.Scale(zero=False, padding=8))
    keys = drawing.legend({study.method: study.method for study in studies})
    bright = alt.condition(drawing.CHOSEN, alt.value(0.8), alt.value(0.08))
    tooltip = [alt.Tooltip("series:N", title="method"), "trial:Q", alt.Tooltip("value:Q", title=title), "accuracy:Q"]
    dots = alt.Chart(drawing.data(rows)).mark_circle(size=60)
    chart = drawing.choosable(dots.encode(x=x, y=y, color=drawing.tint(keys), opacity=bright, tooltip=tooltip))
    told = "; ".join(_told(study, name) for study in studies if name in study.tuned and study.best)
    return Chart(title.capitalize(), drawing.spec(chart, f"Validation accuracy of trials by {title}: {told}.", 220))


def _told(study: _Study, name: str) -> str:
    assert study.best
    return (
        f"best of {study.method} {formats.accuracy(_validated(study.best))} at "
        f"{formats.number(_value(study.best, name), '.3g')}"
    )


def _table(studies: Sequence[_Study]) -> Table:
    rows = [
        [
            Cell(study.method, method=study.method),
            Cell(_count(study)),
            Cell(formats.accuracy(_validated(study.best)) if study.best else "-"),
            Cell(_chosen(study)),
            Cell(study.name),
        ]
        for study in studies
    ]
    return Table("The best trial of each search", _COLUMNS, rows)


def _count(study: _Study) -> str:
    unfinished = sum(not is_over(run) for run in study.runs)
    return f"{len(study.runs)} ({unfinished} unfinished)" if unfinished else str(len(study.runs))


def _chosen(study: _Study) -> str:
    if study.best is None:
        return "-"
    values: dict[str, Any] = {name: float(f"{_value(study.best, name):.3g}") for name in study.tuned}
    return formats.fields(values) or "-"


def _validated(run: Run) -> float:
    return outcome(run, "validation_accuracy")


def _value(run: Run, name: str) -> float:
    """A number of the configuration, where an infinity is a word; NaN where it is not set."""
    value = run.info["config"].get(name)
    return math.nan if value is None else float(value)
