"""Lines over an axis, one a method: the mean over the seeds, with a band of one standard deviation each way."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from tethertune.lab.report import drawing, formats
from tethertune.lab.report.drawing import Chart, Key
from tethertune.lab.report.statistics import Summary
from tethertune.lab.report.tables import Cell, Table

__all__ = ["Axis", "Measure", "Path", "curve", "table"]

Path = Mapping[float, Summary]
"""A summary over the seeds at each place of the axis, ascending."""

_TICKS = 6

_DECADE = 0.1
"""On a log axis a band ends at this part of the mean, where the deviation would take it to 0 or below."""


@dataclass(frozen=True)
class Axis:
    """What the lines run over.

    Attributes:
        name: Its name.
        log: Whether it is logarithmic.
    """

    name: str
    log: bool = False

    def encoding(self, places: Iterable[float]) -> alt.X:
        """The horizontal axis of lines with dots at some places; where these are few, they are its ticks."""
        if self.log:
            axis = alt.Axis(format="~g", tickCount=6, grid=False)
            return alt.X("place:Q", title=self.name, axis=axis, scale=alt.Scale(type="log", nice=False, padding=6))
        known = sorted(set(places))
        axis = alt.Axis(format="d", values=known) if len(known) <= _TICKS else alt.Axis(format="d", tickCount=6)
        return alt.X("place:Q", title=self.name, axis=axis, scale=alt.Scale(nice=False))


@dataclass(frozen=True)
class Measure:
    """What the lines show: a share in percent, or a size on a log axis.

    Attributes:
        name: Its name.
        is_share: Whether it is a fraction of 1.
    """

    name: str
    is_share: bool = True

    @property
    def title(self) -> str:
        """The name with its unit."""
        return f"{self.name}, %" if self.is_share else self.name

    def text(self, summary: Summary) -> str:
        """Mean and deviation as a table has them."""
        if self.is_share:
            return formats.spread(summary).removesuffix(" %")
        mean = formats.number(summary.mean, ".3g")
        return f"{mean} ± {formats.number(summary.deviation, '.2g')}" if math.isfinite(summary.deviation) else mean

    def row(self, summary: Summary) -> dict[str, float | None]:
        """Mean and band as they are drawn."""
        low, high = summary.mean - summary.deviation, summary.mean + summary.deviation
        if self.is_share:
            shares = {"mean": summary.mean, "low": max(low, 0), "high": min(high, 1)}
            return {name: drawing.rounded(100 * value) for name, value in shares.items()}
        sizes = {"mean": summary.mean, "low": max(low, _DECADE * summary.mean), "high": high}
        return {name: drawing.significant(value) if math.isfinite(value) else None for name, value in sizes.items()}

    def is_drawn(self, summary: Summary) -> bool:
        """Whether the axis has a place for the mean."""
        return math.isfinite(summary.mean) and (self.is_share or summary.mean > 0)

    def encoding(self, field: str) -> alt.Y:
        """The vertical axis."""
        if self.is_share:
            return alt.Y(f"{field}:Q", title=self.title, scale=alt.Scale(zero=False))
        axis = alt.Axis(format="~g", tickCount=5)
        return alt.Y(f"{field}:Q", title=self.title, axis=axis, scale=alt.Scale(type="log", nice=False))


def curve(axis: Axis, measure: Measure, paths: Mapping[str, Path], keys: Sequence[Key], told: str) -> Chart | None:
    """A chart of a line a series; None where the axes have a place for nothing.

    Args:
        axis: What the lines run over.
        measure: What they show.
        paths: A path for each label of the keys; a label may be missing.
        keys: The legend.
        told: What the lines say, for who cannot see them.
    """
    rows: list[dict[str, Any]] = [
        {"series": label, "place": place, **measure.row(summary)}
        for label, path in paths.items()
        for place, summary in path.items()
        if measure.is_drawn(summary)
    ]
    if not rows:
        return None
    x, y = axis.encoding(row["place"] for row in rows), measure.encoding("mean")
    faint = alt.condition(drawing.CHOSEN, alt.value(0.14), alt.value(0.02))
    tooltip = [
        alt.Tooltip("series:N", title="method"),
        alt.Tooltip("place:Q", title=axis.name),
        alt.Tooltip("mean:Q", title=measure.title),
    ]
    band = alt.Chart(drawing.data([row for row in rows if row["low"] is not None])).mark_area(aria=False)
    chart = drawing.choosable(
        band.encode(x=x, y=measure.encoding("low"), y2="high:Q", color=drawing.tint(keys), opacity=faint),
        *drawing.lines(rows, keys, x=x, y=y, tooltip=tooltip),
    )
    return Chart(measure.name, drawing.spec(chart, f"{measure.name} by {axis.name}, mean over seeds: {told}.", 260))


def table(caption: str, axis: Axis, columns: Iterable[tuple[str, Measure, Path]]) -> Table:
    """A row for each place of the axis, a column for each head, measure and path."""
    columns = list(columns)
    places = sorted({place for _, _, path in columns for place in path})
    rows = [
        [
            Cell(formats.number(place, "g")),
            *(Cell(measure.text(path[place]) if place in path else "-") for _, measure, path in columns),
        ]
        for place in places
    ]
    return Table(caption, (axis.name.capitalize(), *(head for head, _, _ in columns)), rows)
