"""The figures of the report.

What many layers or seeds say is summed up here, so that the page stays small however many runs there are.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import altair as alt

from tethertune.lab.report import (
    certificates,
    drawing,
    formats,
    frontier,
    learning,
    movement,
    sweeps,
    tables,
    trials,
)
from tethertune.lab.report.drawing import Chart, Figure, Key, colour
from tethertune.lab.report.grouping import Comparison, Group
from tethertune.lab.report.statistics import Difference
from tethertune.lab.report.tables import Cell, Table

__all__ = ["figures"]

_TEXT = "var(--text)"
_MUTED = "var(--muted)"


def figures(comparison: Comparison) -> list[Figure]:
    """All figures of a comparison for which it has data."""
    made = (_accuracies(comparison), learning.figure(comparison), _distances(comparison), _held(comparison))
    return [
        *(figure for figure in made if figure),
        *frontier.figures(comparison),
        *sweeps.figures(comparison),
        *trials.figures(comparison),
        *certificates.figures(comparison),
    ]


def _accuracies(comparison: Comparison) -> Figure | None:
    """Every run as a dot: its accuracy, and its difference to plain fine-tuning with the same seed."""
    groups = [group for group in comparison.groups if any(map(math.isfinite, group.accuracies.values()))]
    if not groups:
        return None
    charts = [_dots(comparison, groups, [_scores(comparison, group) for group in groups], "Test accuracy, %")]
    gains = [_gains(comparison, group, gain) for group in groups if (gain := comparison.difference(group))]
    if gains:
        charts.append(_dots(comparison, groups, gains, "Difference to none, points", zero=True))
    columns = ("Method", "Seed", "Test accuracy", "Difference to none, points")
    return Figure(
        "Accuracy of every run",
        "A faint dot is one seed, a full dot the mean. The bar is one standard deviation each way, most of which all "
        "methods share, and where runs are compared with none seed by seed, the 95 % interval.",
        charts,
        Table(
            "Test accuracy by method and seed", columns, [row for group in groups for row in _runs(comparison, group)]
        ),
    )


def _runs(comparison: Comparison, group: Group) -> Iterator[list[Cell]]:
    """A row of cells for each seed of a group."""
    difference = comparison.difference(group)
    gains = difference.by_seed if difference else {}
    for seed, accuracy in group.accuracies.items():
        gain = formats.points(gains[seed]) if seed in gains else "-"
        name = Cell(comparison.labels[group], method=group.method)
        yield [name, Cell(str(seed)), Cell(formats.accuracy(accuracy)), Cell(gain)]


@dataclass(frozen=True)
class _Scores:
    """Dots and their summary, in percent or points."""

    label: str
    by_seed: dict[int, float]
    mean: float
    low: float
    high: float


def _scores(comparison: Comparison, group: Group) -> _Scores:
    summary, by_seed = group.summary, {seed: 100 * value for seed, value in group.accuracies.items()}
    low, high = summary.mean - summary.deviation, summary.mean + summary.deviation
    return _Scores(comparison.labels[group], by_seed, 100 * summary.mean, 100 * low, 100 * high)


def _gains(comparison: Comparison, group: Group, difference: Difference) -> _Scores:
    by_seed = {seed: 100 * value for seed, value in difference.by_seed.items()}
    low, high = difference.interval or (math.nan, math.nan)
    return _Scores(comparison.labels[group], by_seed, 100 * difference.mean, 100 * low, 100 * high)


def _dots(
    comparison: Comparison, groups: Sequence[Group], scores: Sequence[_Scores], title: str, *, zero: bool = False
) -> Chart:
    means = [
        {
            "series": score.label,
            "mean": drawing.rounded(score.mean),
            "low": drawing.rounded(score.low),
            "high": drawing.rounded(score.high),
        }
        for score in scores
        if math.isfinite(score.mean)
    ]
    seeds = [
        {"series": score.label, "seed": seed, "value": drawing.rounded(value)}
        for score in scores
        for seed, value in score.by_seed.items()
        if math.isfinite(value)
    ]
    labels = [comparison.labels[group] for group in groups]
    y = alt.Y("series:N", title=None, scale=alt.Scale(domain=labels), axis=drawing.label_axis())
    tint = _tint(comparison, groups)
    tooltip = alt.Tooltip("series:N", title="method")
    origin = alt.Chart(drawing.data([{"zero": 0}] if zero else [])).mark_rule(color=_MUTED, strokeDash=[4, 4])
    span = alt.Chart(drawing.data([row for row in means if row["low"] is not None])).mark_rule(
        strokeWidth=3, opacity=0.45
    )
    seed = alt.Chart(drawing.data(seeds)).mark_circle(size=55, opacity=0.45)
    mean = alt.Chart(drawing.data(means)).mark_circle(size=150, opacity=1)
    x = alt.X("value:Q", title=title, scale=alt.Scale(zero=False, padding=8), axis=alt.Axis(tickCount=6, offset=8))
    chart = drawing.layered(
        origin.encode(x="zero:Q"),
        span.encode(x="low:Q", x2="high:Q", y=y, color=tint),
        seed.encode(x=x, y=y, color=tint, tooltip=[tooltip, "seed:Q", alt.Tooltip("value:Q", title=title)]),
        mean.encode(x="mean:Q", y=y, color=tint, tooltip=[tooltip, alt.Tooltip("mean:Q", title=f"mean {title}")]),
    )
    told = "; ".join(f"{score.label} {formats.number(score.mean)}" for score in scores)
    height = sum(16 + 13 * drawing.label_lines(label) for label in labels)
    return Chart(title, drawing.spec(chart, f"{title} by method, mean over seeds: {told}.", height))


def _distances(comparison: Comparison) -> Figure | None:
    """Histograms of the body layers' MARS distances, one a group on common axes, with the radius as a dashed line."""
    groups = comparison.groups
    relative = movement.is_relative(groups)
    lines = {group: movement.radii(group, relative=relative) for group in groups}
    limits = [radius for group in groups for radius in lines[group]]
    distances = [layer.distance(relative=relative) for group in groups for layer in movement.layers(group)]
    bins = movement.bins([*distances, *limits], anchor=min(limits, default=1.0))
    if bins is None:
        return None
    histograms = {group: movement.histogram(group, bins, relative=relative) for group in groups}
    title = "relative MARS distance" if relative else "MARS distance"
    charts = [
        _histogram(comparison, group, histograms[group].counts, lines[group], bins=bins, title=title)
        for group in groups
        if any(histograms[group].counts)
    ]
    edges = [formats.number(edge, ".3g") for edge in bins.edges]
    rows = [
        [
            Cell(f"{edges[place]} to {edges[place + 1]}"),
            *(Cell(formats.number(histograms[group].counts[place], ".3g")) for group in groups),
        ]
        for place in range(bins.count)
    ]
    rows.append(
        [
            Cell("did not move, or not finite"),
            *(Cell(formats.number(histograms[group].still, ".3g")) for group in groups),
        ]
    )
    labels = [comparison.labels[group] for group in groups]
    unit = ", divided by the MARS norm of these" if relative else ""
    return Figure(
        "How far the layers moved",
        f"Body layers by the MARS distance of their weights from the pre-trained ones{unit}, at the end of the run, "
        "mean over the seeds. A dashed line is the radius of a MARS ball: nothing can be to the right of it.",
        charts,
        Table(f"Body layers a run by {title}", ("From, to", *labels), rows),
    )


def _histogram(
    comparison: Comparison,
    group: Group,
    counts: Sequence[float],
    radii: Sequence[float],
    *,
    bins: movement.Bins,
    title: str,
) -> Chart:
    label, edges = comparison.labels[group], bins.edges
    rows = [
        {"from": drawing.significant(low), "to": drawing.significant(high), "layers": drawing.rounded(count), "base": 0}
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
        if count
    ]
    domain = [drawing.significant(edges[0]), drawing.significant(edges[-1])]
    axis = alt.Axis(format="~g", grid=False, tickCount=6)
    x = alt.X("from:Q", title=title, scale=alt.Scale(type="log", domain=domain, nice=False), axis=axis)
    y = alt.Y("layers:Q", title="layers a run", axis=alt.Axis(tickCount=4))
    tooltip = ["from:Q", "to:Q", alt.Tooltip("layers:Q", title="layers a run")]
    bars = (
        alt.Chart(drawing.data(rows))
        .mark_rect(color=colour(group.method), opacity=0.85, stroke="var(--surface)", strokeWidth=0.5)
        .encode(x=x, x2="to:Q", y=y, y2="base:Q", tooltip=tooltip)
    )
    rules = (
        alt.Chart(drawing.data([{"radius": drawing.significant(radius)} for radius in radii]))
        .mark_rule(color=_TEXT, strokeDash=[5, 4], strokeWidth=1.5)
        .encode(x="radius:Q", tooltip=["radius:Q"])
    )
    where = f" radius {', '.join(formats.number(radius, '.3g') for radius in radii)}" if radii else ""
    told = f"{label}: {title} of {formats.number(sum(counts), '.3g')} body layers a run;{where or ' no MARS radius'}."
    return Chart(
        f"{label}{',' if where else ''}{where}", drawing.spec(drawing.layered(bars, rules), told, 130), group.method
    )


def _held(comparison: Comparison) -> Figure | None:
    """How many layers, and how many of their rows, ended at their radius."""
    held = {group: found for group in comparison.groups if (found := movement.held(group))}
    table = tables.held(comparison)
    if table is None:
        return None
    labels = [comparison.labels[group] for group in held]
    rows = [
        {
            "series": comparison.labels[group],
            "layers": drawing.rounded(100 * found.at_radius),
            "rows": drawing.rounded(100 * found.rows_at_radius),
        }
        for group, found in held.items()
    ]
    y = alt.Y("series:N", title=None, scale=alt.Scale(domain=labels), axis=drawing.label_axis())
    x = alt.X("layers:Q", title="at their radius, %", scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(tickCount=5))
    tooltip = [
        alt.Tooltip("series:N", title="method"),
        alt.Tooltip("layers:Q", title="% of layers at their radius"),
        alt.Tooltip("rows:Q", title="% of rows at their radius"),
    ]
    bars = (
        alt.Chart(drawing.data(rows))
        .mark_bar(height=18, opacity=0.85)
        .encode(
            x=x,
            y=y,
            color=_tint(comparison, list(held)),
            tooltip=tooltip,
        )
    )
    ticks = (
        alt.Chart(drawing.data(rows))
        .mark_point(shape="diamond", size=90, filled=True, color=_TEXT, opacity=1)
        .encode(x=alt.X("rows:Q"), y=y, tooltip=tooltip)
    )
    told = "; ".join(
        f"{comparison.labels[group]} {formats.share(found.at_radius)} % of {found.layers} layers, "
        f"{formats.share(found.rows_at_radius)} % of their rows"
        for group, found in held.items()
    )
    height = sum(22 + 13 * drawing.label_lines(label) for label in labels)
    return Figure(
        "Layers at their radius",
        "The bar is the share of constrained body layers that have a row at the radius (within 1 %), the diamond the "
        "share of all their rows: the ball acts on what touches it and leaves the rest alone.",
        [
            Chart(
                "Share at the radius",
                drawing.spec(
                    drawing.layered(bars, ticks), f"Share at the radius at the end of training: {told}.", height
                ),
            )
        ],
        table,
    )


def _tint(comparison: Comparison, groups: Sequence[Group]) -> alt.Color:
    return drawing.tint(Key(comparison.labels[group], colour(group.method), ()) for group in groups)
