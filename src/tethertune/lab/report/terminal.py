"""The report's answer in a terminal: the tables and sentences of the page, without what a terminal has no room for."""

import os
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid

from tethertune.lab import runs
from tethertune.lab.report import answer, grouping, tables
from tethertune.lab.report.answer import Answer
from tethertune.lab.report.grouping import Comparison
from tethertune.lab.report.overview import overview
from tethertune.lab.report.tables import Table

__all__ = ["show"]

_LEFT_OUT = ("Seeds", "To the best", "Time")
"""What the columns begin with that a terminal has no room for."""


def show(paths: Iterable[Path]) -> None:
    """Print what the runs in some folders say: of one task all of it, of several the answer over them and of each.

    Raises:
        RunError: A path that holds no run, or a run that cannot be read.
    """
    console = Console(width=None if os.isatty(1) else 160, highlight=False, markup=False)
    comparisons = grouping.compare(runs.find(paths))
    whole = overview(comparisons)
    if whole is not None:
        _print(console, whole.table, whole.answer)
    for comparison in comparisons:
        if len(comparisons) == 1 and comparison.settings:
            _print(console, _narrow(tables.results(comparison)), answer.answer(comparison))
            console.print("\n".join(answer.tether(comparison)))
        else:
            console.print(f"\n{_title(comparison)}: {answer.answer(comparison).headline}")


def _print(console: Console, table: Table, said: Answer) -> None:
    grid = Grid(title=table.caption, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in table.columns:
        grid.add_column(column)
    for row in table.rows:
        grid.add_row(*(cell.text for cell in row))
    console.print()
    console.print(grid)
    console.print("\n".join(["", said.headline, *said.details]))


def _narrow(table: Table) -> Table:
    kept = [place for place, name in enumerate(table.columns) if not name.startswith(_LEFT_OUT)]
    rows = [[row[place] for place in kept] for row in table.rows]
    return Table(table.caption, [table.columns[place] for place in kept], rows)


def _title(comparison: Comparison) -> str:
    return f"{comparison.model} on {comparison.dataset}"
