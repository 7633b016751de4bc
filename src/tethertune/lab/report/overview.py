"""The answer over all tasks: which method ranks best, by how much over plain fine-tuning, and whether that is noise."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tethertune.lab.report import formats, tables
from tethertune.lab.report.answer import Answer, gap, over, verdict
from tethertune.lab.report.grouping import BASELINE, Comparison, Group, rank
from tethertune.lab.report.statistics import ENOUGH, Difference, mean_difference, ranks
from tethertune.lab.report.tables import Cell, Table

__all__ = ["Overview", "overview", "titles"]


@dataclass(frozen=True)
class Overview:
    """What a reader of many comparisons sees first."""

    answer: Answer
    table: Table


def overview(comparisons: Sequence[Comparison]) -> Overview | None:
    """The answer over the main settings of comparisons, and the table of every method on every task.

    Args:
        comparisons: One for each task and network; None is returned of fewer than two that have results.
    """
    tasks = [comparison for comparison in comparisons if comparison.settings]
    if len(tasks) < 2:
        return None
    standing = _Standing(tasks)
    return Overview(_answer(standing), _table(standing))


def titles(comparisons: Sequence[Comparison]) -> list[str]:
    """A short name for each task: that of the data, and that of the network where there are several."""
    several = len({comparison.model for comparison in comparisons}) > 1
    return [f"{item.dataset}, {item.model}" if several else item.dataset for item in comparisons]


class _Standing:
    """Methods against tasks: the best group of each method in the main setting of each task."""

    def __init__(self, tasks: Sequence[Comparison]) -> None:
        self.tasks = tasks
        trained = {group.method for task in tasks for group in task.settings[0].groups}
        self.methods = sorted(trained.union(*(task.lost for task in tasks)), key=rank)

    @cached_property
    def cells(self) -> dict[tuple[str, int], Group]:
        """The group of a method on a task, by the task's number; absent where no mean is finite."""
        return {
            (method, number): group
            for number, task in enumerate(self.tasks)
            for method in self.methods
            if (group := task.settings[0].best_of(method))
        }

    @cached_property
    def ranked(self) -> list[int]:
        """The tasks where every method has a mean."""
        return [
            number
            for number in range(len(self.tasks))
            if all((method, number) in self.cells for method in self.methods)
        ]

    @cached_property
    def ranks(self) -> dict[str, float]:
        """Mean rank of each method over the ranked tasks; empty when there are none."""
        by_task = [
            ranks({method: self.cells[method, number].summary.mean for method in self.methods})
            for number in self.ranked
        ]
        if not by_task:
            return {}
        return {method: math.fsum(found[method] for found in by_task) / len(by_task) for method in self.methods}

    def minus(self, method: str, other: str) -> Difference | None:
        """The difference of two methods on each ranked task, itself a mean over seeds."""
        by_task = {
            number: difference.mean
            for number in self.ranked
            if (difference := self.cells[method, number].minus(self.cells[other, number]))
        }
        return mean_difference(by_task)

    def beyond_noise(self, method: str, sign: int) -> int:
        """On how many tasks a method is better (1) or worse (-1) than plain fine-tuning by more than noise."""
        differences = [
            task.difference(group)
            for number, task in enumerate(self.tasks)
            if (group := self.cells.get((method, number)))
        ]
        return sum(1 for item in differences if item and item.beyond_noise and math.copysign(1, item.mean) == sign)


def _answer(standing: _Standing) -> Answer:
    count = len(standing.tasks)
    if len(standing.methods) < 2:
        [method] = standing.methods
        return Answer(f"{count} tasks, and only {method} on them: there is nothing to compare yet.", False, (), None)
    if not standing.ranks:
        return Answer(f"{count} tasks, and none with a result of every method, so no rank is given.", False, (), None)
    order = sorted(standing.methods, key=lambda method: standing.ranks[method])
    best = order[0]
    words = f"mean rank {standing.ranks[best]:.3g} of {len(standing.methods)}"
    difference = standing.minus(best, BASELINE) if BASELINE in standing.methods and best != BASELINE else None
    many = f"Over {len(standing.ranked)} tasks" if len(standing.ranked) > 1 else "On the one task with every method"
    if best == BASELINE:
        headline = f"No method ranks better than plain fine-tuning. {many}, {best} has the best {words}."
    elif difference is None:
        headline = f"{many}, {best} has the best {words}; no run of {BASELINE} has its seeds."
    else:
        headline = f"{many}, {best} has the best {words}, {over(difference, BASELINE, 'task')}."
    clear = difference is not None and difference.beyond_noise and difference.mean > 0
    details = [
        *verdict(difference, "task"),
        *_counts(standing, best),
        *_next(standing, order),
        *_unranked(standing),
    ]
    return Answer(headline, clear, details, best)


def _counts(standing: _Standing, best: str) -> Iterator[str]:
    """How often the winner is told from plain fine-tuning on a task of its own."""
    if best == BASELINE or BASELINE not in standing.methods:
        return
    better, worse = (standing.beyond_noise(best, sign) for sign in (1, -1))
    yield (
        f"Task by task, and by more than the scatter between the seeds, {best} is better than {BASELINE} on {better} "
        f"of {len(standing.tasks)} and worse on {worse}."
    )


def _next(standing: _Standing, order: Sequence[str]) -> Iterator[str]:
    """The lead over the method of the next rank, unless that is plain fine-tuning, of which the headline tells."""
    best, rival = order[:2]
    difference = standing.minus(best, rival)
    if difference is None or rival == BASELINE:
        return
    words = f"Its lead over the next, {rival} (mean rank {standing.ranks[rival]:.3g}), is"
    if len(difference.by_seed) < ENOUGH:
        yield f"{words} {formats.points(difference.mean)} points over the tasks: too few of them to tell it from noise."
    else:
        noise = "more than the scatter between the tasks" if difference.beyond_noise else "inside the noise"
        yield f"{words} {gap(difference)} over the tasks: {noise}."


def _unranked(standing: _Standing) -> Iterator[str]:
    names = titles(standing.tasks)
    left_out = [names[number] for number in range(len(standing.tasks)) if number not in standing.ranked]
    if left_out:
        yield f"Not ranked, because not every method has a mean there: {'; '.join(left_out)}."


def _table(standing: _Standing) -> Table:
    columns = ["Method", *titles(standing.tasks), "Mean rank"]
    compares = BASELINE in standing.methods
    if compares:
        columns += ["Tasks better than none", "Tasks worse than none"]
    rows = [_row(standing, method, compares=compares) for method in standing.methods]
    return Table("Test accuracy by method and task, mean ± standard deviation over the seeds", columns, rows)


def _row(standing: _Standing, method: str, *, compares: bool) -> list[Cell]:
    accuracies = [_accuracy(task, standing.cells, method, number) for number, task in enumerate(standing.tasks)]
    mean_rank = formats.number(standing.ranks[method], ".2f") if standing.ranks else "-"
    counts = [
        Cell("-" if method == BASELINE else str(standing.beyond_noise(method, sign))) for sign in (1, -1) if compares
    ]
    return [Cell(method, method=method), *accuracies, Cell(mean_rank), *counts]


def _accuracy(task: Comparison, cells: Mapping[tuple[str, int], Group], method: str, number: int) -> Cell:
    group = cells.get((method, number))
    if method in task.lost:
        return Cell(tables.DIVERGED)
    if group is None:
        there = any(item.method == method for item in task.settings[0].groups)
        return Cell(formats.number(math.nan) if there else "-")
    return Cell(tables.accuracy(group), strong=task.is_clear_winner(group))
