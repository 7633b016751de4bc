"""Make a comparison: search where values are not given, train once a seed, measure the rest, write the report.

Everything that was done is found again in run folders and in the studies' database, so that the same command goes on
where it was stopped, however it was stopped.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tethertune.errors import NonFiniteWeightError, RunInUseError
from tethertune.lab.comparison import Cell, Comparison, Interpolate
from tethertune.lab.config import FinetuneConfig
from tethertune.lab.executors import EXECUTORS
from tethertune.lab.progress import Plan, View
from tethertune.lab.runs import Run, RunFolder, load

if TYPE_CHECKING:
    from tethertune.lab.search import Search

__all__ = ["folders", "lost", "plan", "run"]

_POLL = 1.0
"""Seconds between looks at a run that another process makes."""


@dataclass(frozen=True)
class _Job:
    """One run, to be made somewhere.

    Attributes:
        cell: What it belongs to.
        kind: One of :data:`~tethertune.lab.progress.KINDS`.
        call: Makes it, and returns what came out in a line; ``None`` where another process has it.
    """

    cell: Cell
    kind: str
    call: Callable[[], str | None]


@dataclass
class _Course:
    """The jobs of a cell, one batch after the other, and how many of the present batch are not done."""

    batches: Iterator[list[_Job]]
    open: int = 0


def plan(comparison: Comparison) -> list[Plan]:
    """How many trials, runs and runs of curves each cell has."""
    return [_planned(comparison, cell) for cell in comparison.cells]


def _planned(comparison: Comparison, cell: Cell) -> Plan:
    return Plan(
        cell=cell,
        trial=comparison.trials(cell),
        run=len(comparison.seeds) * max(1, len(cell.given)),
        sweep=len(comparison.swept(cell, {})) * max(1, len(cell.given)),
    )


def run(comparison: Comparison, *, quiet: bool = False) -> Path:
    """Make all that is not made yet, and write the report.

    Args:
        comparison: What to compare.
        quiet: Show nothing.

    Returns:
        The report.

    Raises:
        TethertuneError: What a run raises, but for one that diverges: that is told in the report, and by :func:`lost`.
    """
    from tethertune.lab.report import write

    workers = 1 if comparison.executor == "local" else comparison.workers
    comparison.output.mkdir(parents=True, exist_ok=True)
    pool = EXECUTORS[comparison.executor](workers)
    with View(plan(comparison), workers, quiet=quiet) as view:
        try:
            _make(comparison, pool.submit, workers, view)
        finally:
            pool.shutdown(cancel_futures=True)
    return write(folders(comparison), comparison.output / "report.html")


def folders(comparison: Comparison) -> list[Path]:
    """What there is of a comparison: the runs of its cells whose values are known, and the folder of its trials.

    Runs that an earlier form of it left, with other values, are not among them.
    """
    planned = [
        RunFolder(config).path
        for cell in comparison.cells
        for values in _choices(comparison, cell) or ()
        for config in (*comparison.final(cell, values), *(config for config, _ in comparison.swept(cell, values)))
    ]
    return [path for path in (*planned, comparison.output / "trials") if path.exists()]


def lost(comparison: Comparison) -> list[str]:
    """What to tell of the cells that are without a result because every trial of their search diverged."""
    return [
        f"{cell.name}: {error}"
        for cell in comparison.cells
        if comparison.trials(cell) and (error := _divergence(_search(comparison, cell)))
    ]


def _make(comparison: Comparison, submit: Callable[..., "Future[str | None]"], workers: int, view: View) -> None:
    """Go through the courses of all cells, as few as keep the workers busy at a time, so that cells end early."""
    courses = deque(_Course(_course(comparison, cell, view)) for cell in comparison.cells)
    ready: deque[tuple[_Job, _Course]] = deque()
    running: dict[Future[str | None], tuple[_Job, _Course, float]] = {}

    def advance(course: _Course) -> None:
        jobs = next((jobs for jobs in course.batches if jobs), [])
        course.open = len(jobs)
        ready.extendleft((job, course) for job in reversed(jobs))

    while courses or ready or running:
        while len(running) < workers and (ready or courses):
            if ready:
                job, course = ready.popleft()
                running[submit(job.call)] = job, course, time.monotonic()
            else:
                advance(courses.popleft())
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job, course, began = running.pop(future)
            line = future.result()
            if line is not None:
                view.done(job.cell, job.kind, line, time.monotonic() - began)
            course.open -= 1
            if course.open == 0:
                advance(course)


def _course(comparison: Comparison, cell: Cell, view: View) -> Iterator[list[_Job]]:
    """The jobs of a cell that are not done yet: its trials one by one, then all that counts, then its curves."""
    if comparison.trials(cell):
        search = _search(comparison, cell)
        view.skip(cell, "trial", search.finished())
        while search.finished() < search.settings.trials:
            yield [_Job(cell, "trial", search.advance)]
    choices = _choices(comparison, cell)
    assert choices is not None
    back = comparison.interpolate if comparison.interpolate and comparison.interpolate.scope.holds(cell.task) else None
    for kind, runs in (
        ("run", [(config, None) for values in choices for config in comparison.final(cell, values)]),
        ("sweep", [run for values in choices for run in comparison.swept(cell, values)]),
    ):
        if not choices:
            view.skip(cell, kind, getattr(_planned(comparison, cell), kind))
        calls = [
            partial(_finish, config, part, back if kind == "run" and back and config.seed in back.scope.seeds else None)
            for config, part in runs
        ]
        left = [call for call in calls if not _is_done(call.args[0], call.args[2])]
        view.skip(cell, kind, len(calls) - len(left))
        yield [_Job(cell, kind, call) for call in left]


def _choices(comparison: Comparison, cell: Cell) -> Sequence[Mapping[str, Any]] | None:
    """The values that a cell is trained with, each in turn; ``None`` as long as they are searched for.

    Where every trial of the search has diverged there are none.
    """
    if not comparison.trials(cell):
        return cell.given or ({},)
    search = _search(comparison, cell)
    if search.finished() < search.settings.trials:
        return None
    return () if _divergence(search) else (search.best().values,)


def _divergence(search: "Search") -> NonFiniteWeightError | None:
    """What a search tells that has ended without any result."""
    if search.finished() < search.settings.trials:
        return None
    try:
        search.best()
    except NonFiniteWeightError as error:
        return error
    return None


def _search(comparison: Comparison, cell: Cell) -> "Search":
    from tethertune.lab.search import Search, storage_url, study_name

    assert comparison.search is not None
    return Search(
        config=cell.base,
        settings=comparison.search,
        output=comparison.output,
        storage=storage_url(comparison.output, comparison.storage),
        name=study_name(cell.base, comparison.search),
        workers=1,
        quiet=True,
    )


def _is_done(config: FinetuneConfig, back: Interpolate | None) -> bool:
    """Whether a run is there, with its interpolations, measured on the images that are meant."""
    folder = RunFolder(config)
    if folder.status() != "complete" or back is None:
        return folder.status() in ("complete", "diverged")
    there = [line for line in load(folder.path).interpolations if back.retain in (None, line["retain"])]
    return {*back.alphas} <= {line["alpha"] for line in there}


def _finish(config: FinetuneConfig, part: Mapping[str, Any] | None, back: Interpolate | None) -> str:
    """Make one run and measure its interpolations; tells what came out, in a line."""
    try:
        made = _finetune(config, part)
    except NonFiniteWeightError:
        return f"seed {config.seed} diverged"
    if back is not None:
        from tethertune.lab.interpolation import measure

        measure(made.path, back.alphas, retain=back.retain, retain_size=back.retain_size)
    words = "" if part is None else f"{part['key']} {part['value']:g}, "
    return f"{words}seed {config.seed}, test accuracy {made.info['outcome']['test_accuracy']:.1%}"


def _finetune(config: FinetuneConfig, part: Mapping[str, Any] | None) -> Run:
    """Make a run, after another process that makes it has ended, if one does."""
    from tethertune.lab.training import finetune

    while True:
        try:
            return finetune(config, quiet=True, part=part)
        except RunInUseError:
            time.sleep(_POLL)
