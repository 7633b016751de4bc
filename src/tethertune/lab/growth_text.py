"""The comparison of bounds as a terminal shows it."""

import os

from rich.console import Console
from rich.table import Table

from tethertune.lab.growth import Growth
from tethertune.lab.report.growth import figures, setting

__all__ = ["show"]


def show(growth: Growth) -> None:
    """Print the tables of the figures, and what all numbers have in common."""
    console = Console(width=None if os.isatty(1) else 160, highlight=False, markup=False)
    console.print(setting(growth))
    for figure in figures(growth):
        table = Table(title=figure.table.caption, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for position, column in enumerate(figure.table.columns):
            table.add_column(column, justify="left" if position < 2 else "right", overflow="fold")
        for row in figure.table.rows:
            table.add_row(*(cell.text for cell in row))
        console.print()
        console.print(table)
