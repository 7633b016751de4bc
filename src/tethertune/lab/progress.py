"""One view over all runs of a comparison: a bar on a terminal, a line a run elsewhere, and the time that is left."""

import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from time import monotonic
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from tethertune.lab.comparison import Cell
from tethertune.lab.report.formats import duration

__all__ = ["KINDS", "Plan", "View"]

KINDS = ("trial", "run", "sweep")
"""What is made for a cell: trials of its search, the runs that count, and those of its curves."""


@dataclass(frozen=True)
class Plan:
    """How many of each kind a cell takes in all."""

    cell: Cell
    trial: int
    run: int
    sweep: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.trial + self.run + self.sweep


class View:
    """Shows how a comparison goes.

    Args:
        plans: What there is to do.
        workers: How much of it is done at once.
        quiet: Show nothing.
    """

    def __init__(self, plans: Sequence[Plan], workers: int, *, quiet: bool = False) -> None:
        self._left = Counter({(plan.cell.place, kind): 0 for plan in plans for kind in KINDS})
        for plan in plans:
            for kind in KINDS:
                self._left[plan.cell.place, kind] += getattr(plan, kind)
        self._total, self._workers = self._left.total(), workers
        self._seconds: dict[tuple[tuple[str, str], str], list[float]] = defaultdict(list)
        self._began = monotonic()
        self._console = Console(file=sys.stderr, quiet=quiet)
        self._live = self._console.is_terminal and not quiet
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            transient=True,
            disable=not self._live,
        )
        self._task = self._bar.add_task("runs", total=self._total, left="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def skip(self, cell: Cell, kind: str, count: int = 1) -> None:
        """Count what was made before."""
        self._left[cell.place, kind] -= count
        self._bar.update(self._task, completed=self._total - self._left.total(), left=self.left())

    def done(self, cell: Cell, kind: str, line: str, seconds: float) -> None:
        """Tell of a run that has just ended.

        Args:
            cell: What it belongs to.
            kind: One of :data:`KINDS`.
            line: What came out.
            seconds: How long it took.
        """
        self._seconds[cell.place, kind].append(seconds)
        self.skip(cell, kind)
        number = self._total - self._left.total()
        told = f"[{number}/{self._total}, {duration(monotonic() - self._began)}, {self.left()}] {cell.name}: {line}"
        self._console.print(told, markup=False, highlight=False, soft_wrap=True)

    def left(self) -> str:
        """How long the rest takes, judged by like runs so far; and by all runs where there is none like it yet."""
        known = [seconds for runs in self._seconds.values() for seconds in runs]
        if not known or not self._left.total():
            return "nothing left" if not self._left.total() else "time left not known yet"
        seconds = sum(count * fmean(self._seconds.get(key) or known) for key, count in self._left.items())
        return f"about {duration(seconds / self._workers)} left"
