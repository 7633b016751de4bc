"""Write the tables of ``docs/results.md`` from the recorded numbers in ``docs/results/``.

Usage: ``python scripts/make_results.py``. A recording is what ``tethertune report FOLDER --format json`` wrote of a
comparison that the page names: ``comparison*.json`` of the results, each of some tasks, and ``curves*.json`` of what
was measured around them. Each table stands between two comments, ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``;
the rest of the page is written by hand.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tethertune.lab.report import formats
from tethertune.lab.report.statistics import Summary, ranks, summarise

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
Methods = Mapping[str, Mapping[str, Any]]


def render(page: str, tasks: Sequence[Mapping[str, Any]], curves: Sequence[Mapping[str, Any]]) -> str:
    """The page with every table made anew.

    Args:
        page: The page as it is.
        tasks: The recorded tasks.
        curves: Those with curves around their results.
    """
    tables = {
        "overview": overview(tasks),
        "differences": differences(tasks),
        "values": values(tasks),
        "rates": rates(curves),
        "frontier": frontier(curves),
    }
    for name, lines in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        table = "\n".join([begin, "", *lines, "", end])
        page = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, table=table: table, page, flags=re.DOTALL)
    return page


def overview(tasks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Accuracy of every method on every task, and its mean rank."""
    by_task = [_methods(task) for task in tasks]
    ranked = [ranks({name: found["mean"] for name, found in methods.items()}) for methods in by_task]
    yield from _head(["Task", *by_task[0]], aligned="-" + ":" * len(by_task[0]))
    for task, methods in zip(tasks, by_task, strict=True):
        yield _row([task["task"], *(_accuracy(found) for found in methods.values())])
    yield _row(["mean rank", *(formats.number(fmean(r[name] for r in ranked), ".2f") for name in by_task[0])])


def differences(tasks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Paired differences to plain fine-tuning with their intervals; bold where they leave out 0."""
    names = [name for name in _methods(tasks[0]) if name != "none"]
    yield from _head(["Task", *names], aligned="-" + ":" * len(names))
    for task in tasks:
        yield _row([task["task"], *(_difference(_methods(task)[name]["minus_none"]) for name in names)])


def values(tasks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the search chose."""
    names = list(_methods(tasks[0]))
    yield from _head(["Task", *names])
    for task in tasks:
        yield _row([task["task"], *(_values(found["values"]) for found in _methods(task).values())])


def rates(tasks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Accuracy of every method at each learning rate of a sweep."""
    for task in tasks:
        points: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        for point in task["sweeps"]:
            if point["key"] == "lr":
                points[point["method"]][point["value"]].append(_or_nan(point["accuracy"]))
        if not points:
            continue
        swept = sorted({value for of_method in points.values() for value in of_method})
        yield f"{task['task']}:"
        yield ""
        yield from _head(["Learning rate", *map(formats.value, swept)], aligned="-" + ":" * len(swept))
        for name in (name for name in _methods(task) if name in points):
            yield _row([name, *(formats.spread(summarise(points[name][value])) for value in swept)])
        yield ""


def frontier(tasks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Accuracy and retention of every method at each interpolation."""
    for task in tasks:
        found = {name: group["interpolations"] for name, group in _methods(task).items() if group["interpolations"]}
        if not found:
            continue
        alphas = sorted({point["alpha"] for points in found.values() for point in points}, reverse=True)
        yield f"{task['task']}, accuracy / retention in percent:"
        yield ""
        yield from _head(["Alpha", *map(formats.value, alphas)], aligned="-" + ":" * len(alphas))
        for name, points in found.items():
            by_alpha = {point["alpha"]: point for point in points}
            yield _row([name, *(_both(by_alpha.get(alpha)) for alpha in alphas)])
        yield ""


def _methods(task: Mapping[str, Any]) -> Methods:
    """The methods of the main setting of a task."""
    return {group["method"]: group for group in task["settings"][0]["methods"]}


def _accuracy(found: Mapping[str, Any]) -> str:
    deviation = _or_nan(found["deviation"])
    return formats.spread(Summary(_or_nan(found["mean"]), deviation, len(found["accuracies"]))).removesuffix(" %")


def _difference(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    text = f"{formats.points(found['mean'])} ({formats.points(low)} to {formats.points(high)})"
    return f"**{text}**" if found["beyond_noise"] else text


def _values(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in given.items() if value is not None)


def _both(point: Mapping[str, Any] | None) -> str:
    return "-" if point is None else f"{formats.share(point['accuracy'])} / {formats.share(point['retention'])}"


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _head(columns: Sequence[str], aligned: str = "") -> Iterator[str]:
    yield _row(columns)
    yield _row(["---:" if mark == ":" else "---" for mark in aligned.ljust(len(columns), "-")])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def read(kind: str) -> list[Mapping[str, Any]]:
    """The tasks of the recordings of a kind beside the page, by name of file and then as recorded."""
    files = sorted(PAGE.with_suffix("").glob(f"{kind}*.json"))
    return [task for path in files for task in json.loads(path.read_text(encoding="utf-8"))["tasks"]]


if __name__ == "__main__":
    page = render(PAGE.read_text(encoding="utf-8"), read("comparison"), read("curves"))
    PAGE.write_text(page, encoding="utf-8")
