"""The report as one HTML page that needs nothing from anywhere, or as Markdown: the same content in the same order."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tethertune.lab.report import charts, page, records, tables
from tethertune.lab.report.answer import Answer, answer, tether
from tethertune.lab.report.drawing import Figure
from tethertune.lab.report.grouping import Comparison
from tethertune.lab.report.records import Record, Sheet
from tethertune.lab.report.tables import Table
from tethertune.lab.runs import Run

__all__ = ["html", "markdown"]


@dataclass(frozen=True)
class _Section:
    """One comparison, ready to be printed."""

    title: str
    context: str
    answer: Answer
    tether: Sequence[str]
    results: Table | None
    held: Table | None
    figures: Sequence[Figure]
    sheets: Sequence[Sheet]
    unfinished: Sequence[Record]
    repeated: Sequence[Record]


def html(comparisons: Sequence[Comparison], home: Path) -> str:
    """One page with its style, its charts and the program that draws them inside.

    Args:
        comparisons: What to report.
        home: The folder of the page, which links to run folders are relative to.
    """
    sections, machines = _sections(comparisons, home, with_figures=True)
    return page.html("report.html.j2", title=_title(sections), sections=sections, machines=machines)


def markdown(comparisons: Sequence[Comparison], home: Path) -> str:
    """The answers, tables and commands, for where no page can be shown.

    Args:
        comparisons: What to report.
        home: The folder of the file, which links to run folders are relative to.
    """
    sections, machines = _sections(comparisons, home, with_figures=False)
    return page.markdown("report.md.j2", title=_title(sections), sections=sections, machines=machines)


def _sections(comparisons: Sequence[Comparison], home: Path, *, with_figures: bool) -> tuple[list[_Section], list[str]]:
    every = [run for comparison in comparisons for group in comparison.groups for run in group.runs.values()]
    every += [run for comparison in comparisons for run in (*comparison.unfinished, *comparison.repeated)]
    surroundings = records.Surroundings(home, every)
    return [_section(comparison, surroundings, with_figures=with_figures) for comparison in comparisons], (
        surroundings.described
    )


def _section(comparison: Comparison, surroundings: records.Surroundings, *, with_figures: bool) -> _Section:
    return _Section(
        title=f"{comparison.model} on {comparison.dataset}",
        context=records.context(comparison),
        answer=answer(comparison),
        tether=tether(comparison),
        results=tables.results(comparison) if comparison.settings else None,
        held=tables.held(comparison),
        figures=charts.figures(comparison) if with_figures and comparison.settings else (),
        sheets=[surroundings.sheet(comparison, group) for group in comparison.groups],
        unfinished=[surroundings.record(run, _name(run)) for run in comparison.unfinished],
        repeated=[surroundings.record(run, _name(run)) for run in comparison.repeated],
    )


def _name(run: Run) -> str:
    config = run.info["config"]
    return f"{config['method']}, seed {config['seed']}"


def _title(sections: Sequence[_Section]) -> str:
    return f"Fine-tuning {sections[0].title}" if len(sections) == 1 else f"Fine-tuning: {len(sections)} comparisons"
