"""What every figure is made of: Vega-Lite specifications that Altair makes, each with the table of what it draws.

Colours are CSS variables (``var(--method-none)``) that the page replaces by the light or the dark value when it draws.
Every spec is as wide as its container.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from tethertune.lab.methods import METHODS
from tethertune.lab.report.tables import Table

__all__ = [
    "CHOSEN",
    "DASHES",
    "Chart",
    "Figure",
    "Key",
    "choosable",
    "colour",
    "data",
    "label_axis",
    "label_lines",
    "layered",
    "legend",
    "lines",
    "rounded",
    "significant",
    "spec",
    "tint",
]

DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
"""Dashes of lines that share a colour."""

CHOSEN = "chosen == '' || datum.series == chosen"
"""Whether a mark's series is the one that a button of the legend brings out, or none is."""


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a label, its colour, and the dashes of its line."""

    label: str
    colour: str
    dash: Sequence[int]


@dataclass(frozen=True)
class Chart:
    """One drawing: what stands above it, and its Vega-Lite specification, which carries its description."""

    title: str
    spec: dict[str, Any]
    method: str | None = None


@dataclass(frozen=True)
class Figure:
    """Charts that are read together, the table of what they draw, and a legend if they need one."""

    title: str
    text: str
    charts: Sequence[Chart]
    table: Table
    legend: Sequence[Key] = ()


def colour(method: str) -> str:
    """The CSS variable that holds the colour of a method, the same in every report."""
    return f"var(--method-{method if method in METHODS else 'other'})"


def data(rows: Iterable[dict[str, Any]]) -> alt.InlineData:
    """Rows as the data of a mark."""
    return alt.InlineData(values=list(rows))


def tint(keys: Iterable[Key]) -> alt.Color:
    """The colour of each series."""
    keys = list(keys)
    scale = alt.Scale(domain=[key.label for key in keys], range=[key.colour for key in keys])
    return alt.Color("series:N", legend=None, scale=scale)


def legend(series: Mapping[str, str]) -> list[Key]:
    """An entry for each label, whose method gives the colour; those of one colour differ in their dashes."""
    seen: dict[str, int] = {}
    keys = []
    for label, method in series.items():
        shade = colour(method)
        place = seen[shade] = seen.get(shade, -1) + 1
        keys.append(Key(label, shade, DASHES[place % len(DASHES)]))
    return keys


def lines(
    rows: Sequence[dict[str, Any]],
    keys: Sequence[Key],
    *,
    x: alt.X,
    y: alt.Y,
    tooltip: Sequence[Any],
    order: str | None = None,
) -> list[alt.Chart]:
    """A line with dots for each series; rows have the key's label as their ``series``. Goes into :func:`choosable`.

    Args:
        rows: What is drawn.
        keys: The series.
        x: The horizontal axis, along which a line goes unless ``order`` says otherwise.
        y: The vertical axis.
        tooltip: What a dot tells.
        order: The field, with its type, along which a line goes.
    """
    scale = alt.Scale(domain=[key.label for key in keys], range=[list(key.dash) for key in keys])
    bright = alt.condition(CHOSEN, alt.value(1), alt.value(0.12))
    line = alt.Chart(data(rows)).mark_line(strokeWidth=2.2)
    dots = alt.Chart(data(rows)).mark_circle(size=26)
    dash = alt.StrokeDash("series:N", legend=None, scale=scale)
    path = {"order": order} if order else {}
    return [
        line.encode(x=x, y=y, color=tint(keys), strokeDash=dash, opacity=bright, **path),
        dots.encode(x=x, y=y, color=tint(keys), opacity=bright, tooltip=list(tooltip)),
    ]


def label_axis() -> alt.Axis:
    """An axis of labels; those of several words go over several lines, which a narrow screen needs."""
    return alt.Axis(
        labelExpr="split(replace(datum.label, ')', ''), regexp(' [(]|, '))", labelLimit=170, ticks=False, domain=False
    )


def label_lines(label: str) -> int:
    """How many lines a label takes up on such an axis."""
    return len(re.split(r" \(|, ", label))


def layered(*marks: alt.Chart) -> alt.LayerChart:
    """The marks over one another; those without data are left out, for they would spoil the scales."""
    return alt.layer(*(mark for mark in marks if mark.data.values))


def choosable(*marks: alt.Chart) -> alt.LayerChart:
    """The marks over one another, with a series that the legend can bring out."""
    return layered(*marks).add_params(alt.param(name="chosen", value=""))


def spec(chart: alt.LayerChart, description: str, height: int) -> dict[str, Any]:
    """The specification for the page, whose theme it takes."""
    made: dict[str, Any] = chart.properties(
        width="container",
        height=height,
        description=description,
        autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
    ).to_dict()
    del made["config"]  # the page brings the theme
    return made


def rounded(value: float) -> float | None:
    """Two decimals, as much as an eye can tell; null where JSON has no word for the value."""
    return round(value, 2) if math.isfinite(value) else None


def significant(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")
