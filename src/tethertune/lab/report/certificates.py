"""The certificates of the runs that have one: what each layer adds, and every bound beside the others."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import altair as alt

from tethertune.lab.report import drawing, formats
from tethertune.lab.report.drawing import Chart, Figure
from tethertune.lab.report.grouping import Comparison
from tethertune.lab.report.tables import Cell, Table

__all__ = ["figures"]

_SHOWN = 20
"""Layers in a chart, those that add most; the table has them all."""
_RANGE = "var(--muted)"


def figures(comparison: Comparison) -> list[Figure]:
    """A figure for each run that ``tethertune certify`` was asked about."""
    return [
        _figure(f"{comparison.labels[group]}, seed {seed}", group.method, found)
        for group in comparison.groups
        for seed, run in group.runs.items()
        if (found := run.certificate.get("certificate"))
    ]


def _figure(label: str, method: str, found: Mapping[str, Any]) -> Figure:
    made = (_bounds(label, method, found), _contributions(label, method, found))
    charts = [chart for chart in made if chart]
    columns = ("Bound or layer", "log10, or distance / bound", "What it is")
    return Figure(f"Certificate: {label}", _text(found), charts, Table(f"Bounds of {label}", columns, [*_rows(found)]))


def _text(found: Mapping[str, Any]) -> str:
    """What the certificate says, in words."""
    gap = _number(found["gap"])
    total = _number(found["total"])
    verdict = "It is vacuous" if found["vacuous"] else "It is not vacuous"
    return (
        f"With probability {1 - found['delta']:g} over the draw of the {found['samples']} training images, the "
        f"expected loss ({found['loss']}) is at most the empirical loss {found['empirical_loss']:.4f} plus a gap of "
        f"{gap}: {total}. {verdict}. {found['mode'].capitalize()} radii; the confidence term is "
        f"{found['confidence']:.4f}. Bounds are of the complexity (a gap is twice that and the confidence term) "
        f"except where marked. Those of the paper are {formats.AS_PRINTED}: they leave out a term."
    )


def _bounds(label: str, method: str, found: Mapping[str, Any]) -> Chart | None:
    """log10 of every bound; those that are 0 have no place on the axis and are in the table only."""
    rows = [
        {"bound": bound["name"], "log10": round(bound["log10"], 4), "kind": _kind(bound), "zero": 0}
        for bound in found["comparison"]
        if bound["log10"] is not None
    ]
    if not rows:
        return None
    valid = alt.datum.kind != formats.AS_PRINTED
    bars = (
        alt.Chart(drawing.data(rows))
        .mark_bar(height=14)
        .encode(
            x=alt.X("log10:Q", title="log10 of the bound", axis=alt.Axis(tickCount=6)),
            x2="zero:Q",
            y=_axis([row["bound"] for row in rows], "bound"),
            color=alt.condition(valid, alt.value(drawing.colour(method)), alt.value(_RANGE)),
            tooltip=["bound:N", "log10:Q", "kind:N"],
        )
    )
    told = "; ".join(f"{row['bound']} {formats.number(row['log10'])}" for row in rows)
    description = f"log10 of the bounds of {label}: {told}. The printed ones are grey."
    title = f"log10 of the bounds; grey: {formats.AS_PRINTED}"
    return Chart(title, drawing.spec(drawing.layered(bars), description, 26 * len(rows)), method)


def _contributions(label: str, method: str, found: Mapping[str, Any]) -> Chart | None:
    layers = sorted((layer for layer in found["layers"] if layer["share"]), key=lambda layer: -layer["share"])[:_SHOWN]
    if not layers:
        return None
    rows = [
        {
            "layer": layer["name"],
            "share": drawing.significant(100 * layer["share"]),
            "elasticity": drawing.significant(layer["distance_elasticity"]),
        }
        for layer in layers
    ]
    bars = (
        alt.Chart(drawing.data(rows))
        .mark_bar(height=9, opacity=0.85, color=drawing.colour(method))
        .encode(
            x=alt.X("share:Q", title="share of the sum of distance / bound, %", axis=alt.Axis(tickCount=5)),
            y=_axis([row["layer"] for row in rows], "layer"),
            tooltip=["layer:N", "share:Q", alt.Tooltip("elasticity:Q", title="elasticity of the distance bound")],
        )
    )
    most = rows[0]
    told = f"What each layer adds to {label}: {most['layer']} most, {formats.number(most['share'])} %."
    return Chart("What each layer adds", drawing.spec(drawing.layered(bars), told, 16 * len(rows)), method)


def _rows(found: Mapping[str, Any]) -> Iterator[Sequence[Cell]]:
    for bound in found["comparison"]:
        about = " (a gap)" if bound["about"] == "gap" else ""
        yield [Cell(f"{bound['name']}{about}"), Cell(_log10(bound["log10"])), Cell(_kind(bound))]
    for layer in found["layers"]:
        if layer["share"]:
            told = f"{100 * layer['share']:.1f} % of the sum; elasticity {layer['distance_elasticity']:.3f}"
            yield [
                Cell(layer["name"]),
                Cell(f"{layer['distance'] / (layer['reference'] + layer['distance']):.3g}"),
                Cell(told),
            ]


def _axis(names: Sequence[str], field: str) -> alt.Y:
    axis = alt.Axis(labelLimit=200, ticks=False, domain=False)
    return alt.Y(f"{field}:N", title=None, scale=alt.Scale(domain=list(dict.fromkeys(names))), axis=axis)


def _kind(bound: Mapping[str, Any]) -> str:
    return str(bound["kind"]) if bound["kind"] in ("certificate", "measurement") else formats.AS_PRINTED


def _log10(value: float | None) -> str:
    return f"{formats.number(-math.inf)} (0)" if value is None else formats.number(value, ".2f")


def _number(value: float | None) -> str:
    """Four digits; what passes 10^300 is said to."""
    return "more than 10^300" if value is None else formats.number(value, ".4g")
