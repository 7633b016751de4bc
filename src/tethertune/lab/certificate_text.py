"""A certificate as a terminal shows it."""

import math
import os
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tethertune.lab.certify import Finding
from tethertune.lab.report.formats import AS_PRINTED
from tethertune.theory import Bound, Certificate, LayerMeasurement, LayerReport

__all__ = ["show"]

_SHOWN = 10


def show(finding: Finding) -> None:
    """Print what was found of a checkpoint."""
    console = Console(width=None if os.isatty(1) else 160, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{finding.checkpoint}\nfrom {finding.reference}\non {finding.data}\n")
    if finding.certificate is None:
        console.print(f"No certificate: {finding.refusal}\nMeasurements of its layers, which guarantee nothing:\n")
        console.print(_measured(finding.measurements))
    else:
        _show(finding.certificate, console)


def _show(found: Certificate, console: Console) -> None:
    for line in _summary(found):
        console.print(line)
    moving = [layer for layer in found.layers if layer.distance > 0]
    console.print(f"{len(moving)} of the body's {len(found.layers)} linear maps may move.")
    rankings = (_first(moving), _frozen(found, moving)) if moving else ()
    for table in (*rankings, _bounds(found), _checks(found)):
        console.print()
        console.print(table)


def _summary(found: Certificate) -> list[str]:
    """The certificate in a few lines."""
    frozen, moved = (log10 for _, log10 in found.distance.parts)
    total = "more than 10^300" if found.total is None else _plain(math.log10(found.total))
    parts = f": frozen features {_plain(frozen)}, moved {_plain(moved)}" if found.complexity is found.distance else ""
    paid = f", {found.price:.1f} nats of it for {', '.join(found.paid)}" if found.paid else ""
    lines = [
        f"{found.kind.capitalize()}, {found.mode} mode, fails with probability at most {found.delta:g}",
        f"Loss: {found.loss}; {found.samples} training images, {found.classes} classes",
        f"  empirical loss   {found.empirical_loss:.4f}  (training error {found.empirical_error:.2%})",
        f"  complexity       {_plain(found.complexity.log10)}  ({found.complexity.name}{parts})",
        f"  confidence term  {found.confidence:.4f}{paid}",
        f"  gap              {_plain(found.gap_log10)}  (2 x complexity + confidence term)",
        f"  expected loss <= {total}{', which bounds the error of new images too' if found.bounds_error else ''}",
        _verdict(found),
    ]
    if found.vacuous and found.samples_needed_log10 > math.log10(found.samples):
        lines.append(
            f"Twice the complexity would be half of the range with 10^{found.samples_needed_log10:.1f} images."
        )
    return lines


def _verdict(found: Certificate) -> str:
    if not found.vacuous:
        return "NOT VACUOUS."
    if found.gap_log10 >= math.log10(found.loss_range):
        return "VACUOUS: the gap alone reaches the range of the loss."
    return "VACUOUS: the gap is below the range of the loss, but with the empirical loss it reaches it."


def _first(moving: Sequence[LayerReport]) -> Table:
    table = _table(
        "Radii to shrink first: change of the bounds in % for 1 % of D",
        ("layer", "B", "D", "measured D", "share of D/B", "printed", "product", "distance"),
    )
    for layer in sorted(moving, key=lambda layer: -layer.distance_elasticity)[:_SHOWN]:
        numbers = (layer.bound, layer.distance, layer.measured_distance)
        shares = (layer.share, layer.printed_elasticity, layer.product_elasticity, layer.distance_elasticity)
        table.add_row(layer.name, *(f"{n:.4g}" for n in numbers), *(f"{n:.3f}" for n in shares))
    return table


def _frozen(found: Certificate, moving: Sequence[LayerReport]) -> Table:
    table = _table(
        f"Layers to freeze first: log10 of the distance bound, now {_log10(found.distance.log10)}",
        ("layer", "this one frozen", "it and all before it frozen"),
    )
    for layer in sorted(moving, key=lambda layer: layer.frozen_log10)[:_SHOWN]:
        table.add_row(layer.name, _log10(layer.frozen_log10), _log10(layer.suffix_log10))
    return table


def _bounds(found: Certificate) -> Table:
    table = _table("All bounds", ("bound", "of", "log10", "what it is"))
    for bound in found.comparison:
        table.add_row(bound.name, bound.about, _log10(bound.log10), _status(bound))
    return table


def _status(bound: Bound) -> str:
    if bound.kind == "certificate":
        return "certificate"
    if bound.kind == "measurement":
        return "measurement"
    return AS_PRINTED + ("; above a valid one for these numbers" if bound.is_upper_bound else "")


def _checks(found: Certificate) -> Table:
    table = _table("Preconditions", ("", "what must hold", "how it was found"))
    for check in found.checks:
        table.add_row(check.status, check.name, check.detail)
    return table


def _measured(layers: Sequence[LayerMeasurement]) -> Table:
    table = _table(
        f"{len(layers)} layers, those that moved most first",
        ("layer", "MARS distance", "MARS norm", "Frobenius distance", "Frobenius norm", "share of D/B"),
    )
    for layer in sorted(layers, key=lambda layer: -layer.share):
        numbers = (layer.distance, layer.reference, layer.frobenius, layer.reference_frobenius)
        table.add_row(layer.name, *(f"{n:.4g}" for n in numbers), f"{layer.share:.3f}")
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for position, column in enumerate(columns):
        words = position == 0 or column.startswith(("what", "how", "of"))
        table.add_column(column, justify="left" if words else "right", overflow="fold")
    return table


def _log10(value: float) -> str:
    return "-inf (0)" if value == -math.inf else f"{value:.2f}"


def _plain(log10: float) -> str:
    """A number by its logarithm: as it is where that is short, else a power of ten."""
    if log10 == -math.inf:
        return "0"
    return f"{10**log10:.4f}" if -4 < log10 < 4 else f"10^{log10:.1f}"
