"""The paper's Tables 2 and 3: what was obtained, what the paper printed, and the difference."""

from collections.abc import Iterator, Sequence

from tethertune.lab import paper
from tethertune.lab.methods import METHODS
from tethertune.lab.report import formats, tables
from tethertune.lab.report.grouping import Comparison, Group, data_name
from tethertune.lab.report.statistics import Summary
from tethertune.lab.report.tables import Cell, Table

__all__ = ["notes", "paper_tables"]

_SPLITS = ("train", "validation", "test")


def paper_tables(comparisons: Sequence[Comparison]) -> list[Table]:
    """A table for each network of the paper that runs of its data sets are of, in the order of the paper.

    Args:
        comparisons: All that is reported; those of other networks or data sets are left out.
    """
    return [
        _table(f"{title}: {model} beside the paper", model_network, found)
        for model_network, title in paper.NETWORKS.items()
        for model in sorted({comparison.model for comparison in comparisons})
        if paper.network(model) == model_network
        and (found := [item for item in comparisons if item.model == model and _data(item)])
    ]


def notes(comparisons: Sequence[Comparison]) -> list[str]:
    """What has to be known to read the tables: where the images are not as many as the paper's."""
    told = [
        f"{item.dataset} has {formats.sizes(ours)} images here and {formats.sizes(theirs)} in the paper"
        for item in comparisons
        if paper.network(item.model) and _data(item) and (ours := _here_sizes(item)) != (theirs := _paper_sizes(item))
    ]
    return [f"Not the paper's sizes: {'; '.join(dict.fromkeys(told))}."] if told else []


def _table(caption: str, network: str, found: Sequence[Comparison]) -> Table:
    methods = [method for method in METHODS if any(i.settings[0].best_of(method) or method in i.lost for i in found)]
    rows = [row for method in methods for row in _rows(network, method, found)]
    return Table(caption, ("Method", "What", *(item.dataset for item in found)), rows)


def _rows(network: str, method: str, found: Sequence[Comparison]) -> Iterator[list[Cell]]:
    """What was obtained, what was printed, and the first minus the second, in percent and points."""
    pairs = [(item, item.settings[0].best_of(method), paper.accuracy(network, method, _data(item))) for item in found]
    yield [Cell(method, method=method), Cell("here"), *(_here(item, group, method) for item, group, _ in pairs)]
    yield [Cell(method), Cell("paper"), *(_printed(printed) for _, _, printed in pairs)]
    yield [Cell(method), Cell("difference"), *(_difference(group, printed) for _, group, printed in pairs)]


def _here(comparison: Comparison, group: Group | None, method: str) -> Cell:
    if method in comparison.lost:
        return Cell(tables.DIVERGED)
    return Cell(tables.accuracy(group), strong=comparison.is_clear_winner(group)) if group else Cell("-")


def _printed(printed: paper.Printed | None) -> Cell:
    return Cell(formats.spread(Summary(printed.mean, printed.deviation, 5)) if printed else "-")


def _difference(group: Group | None, printed: paper.Printed | None) -> Cell:
    return Cell(formats.points(group.summary.mean - printed.mean) if group and printed else "-")


def _data(comparison: Comparison) -> str:
    """The data set of the paper that a comparison is on; empty if there are no results on one."""
    if not comparison.settings:
        return ""
    name = data_name(next(iter(comparison.groups[0].runs.values())))
    return name if paper.sizes(name) else ""


def _here_sizes(comparison: Comparison) -> dict[str, int]:
    sizes = next(iter(comparison.groups[0].runs.values())).info["data"]["sizes"]
    return {split: sizes[split] for split in _SPLITS if split in sizes}


def _paper_sizes(comparison: Comparison) -> dict[str, int]:
    """The sizes of Table 1, where the validation images are trained on as well if they are here."""
    printed = paper.sizes(_data(comparison)) or {}
    both = comparison.settings[0].fields.get("train_on") == "train+validation"
    more = printed["validation"] if both else 0
    return {split: printed[split] + (more if split == "train" else 0) for split in _SPLITS}
