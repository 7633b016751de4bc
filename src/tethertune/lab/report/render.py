"""The report as one HTML page that needs nothing from anywhere, or as Markdown: the same content in the same order."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from altair.utils import schemapi

from tethertune.lab.report import charts, frontier, page, paper_tables, records, sweeps, tables, trials
from tethertune.lab.report.answer import Answer, answer, tether
from tethertune.lab.report.drawing import Figure
from tethertune.lab.report.grouping import Comparison
from tethertune.lab.report.overview import Overview, overview
from tethertune.lab.report.records import Record, Sheet
from tethertune.lab.report.tables import Table
from tethertune.lab.runs import Run

__all__ = ["html", "markdown"]


@dataclass(frozen=True)
class _Content:
    """The whole report, ready to be printed."""

    title: str
    overview: Overview | None
    paper: Sequence[Table]
    notes: Sequence[str]
    sections: "Sequence[_Section]"
    machines: Sequence[str]


@dataclass(frozen=True)
class _Section:
    """One comparison; the tables are those that an HTML page has within its figures."""

    title: str
    context: str
    answer: Answer
    tether: Sequence[str]
    results: Table | None
    tables: Sequence[Table]
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
    return page.html("report.html.j2", **vars(_content(comparisons, home, with_figures=True)))


def markdown(comparisons: Sequence[Comparison], home: Path) -> str:
    """The answers, tables and commands, for where no page can be shown.

    Args:
        comparisons: What to report.
        home: The folder of the file, which links to run folders are relative to.
    """
    return page.markdown("report.md.j2", **vars(_content(comparisons, home, with_figures=False)))


def _content(comparisons: Sequence[Comparison], home: Path, *, with_figures: bool) -> _Content:
    every = [run for comparison in comparisons for group in comparison.groups for run in group.runs.values()]
    every += [run for comparison in comparisons for run in (*comparison.unfinished, *comparison.repeated)]
    surroundings = records.Surroundings(home, every)
    sections = [_section(comparison, surroundings, with_figures=with_figures) for comparison in comparisons]
    return _Content(
        title=_title(sections),
        overview=overview(comparisons),
        paper=paper_tables.paper_tables(comparisons),
        notes=paper_tables.notes(comparisons),
        sections=sections,
        machines=surroundings.described,
    )


def _section(comparison: Comparison, surroundings: records.Surroundings, *, with_figures: bool) -> _Section:
    return _Section(
        title=f"{comparison.model} on {comparison.dataset}",
        context=records.context(comparison),
        answer=answer(comparison),
        tether=tether(comparison),
        results=tables.results(comparison) if comparison.settings or comparison.lost else None,
        tables=_tables(comparison),
        figures=_figures(comparison) if with_figures else (),
        sheets=[surroundings.sheet(comparison, group) for group in comparison.groups],
        unfinished=[surroundings.record(run, _name(run)) for run in comparison.unfinished],
        repeated=[surroundings.record(run, _name(run)) for run in comparison.repeated],
    )


def _figures(comparison: Comparison) -> list[Figure]:
    """All figures, without Altair's check of every part against the grammar, which takes most of the time."""
    with schemapi.debug_mode(False):
        return charts.figures(comparison)


def _tables(comparison: Comparison) -> list[Table]:
    held = tables.held(comparison)
    return [
        *([held] if held else []),
        *frontier.tables(comparison),
        *sweeps.tables(comparison),
        *trials.tables(comparison),
    ]


def _name(run: Run) -> str:
    config = run.info["config"]
    return f"{config['method']}, seed {config['seed']}"


def _title(sections: Sequence[_Section]) -> str:
    return f"Fine-tuning {sections[0].title}" if len(sections) == 1 else f"Fine-tuning: {len(sections)} comparisons"
