"""The pictures of the documentation, drawn by each build from real runs.

``differences``, ``rates`` and ``frontier`` show the recorded results in ``docs/results/``. ``price`` is what the
tutorial's own program prints, which is run for it.
"""

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from sphinx.application import Sphinx

DOCS = Path(__file__).parents[1]
COLOURS = {
    "none": "#808080",
    "l2-sp": "#3399d1",
    "mars-sp": "#cb8500",
    "delta": "#159c76",
    "l2-pgm": "#2f6bc0",
    "mars-pgm": "#e0571c",
}
"""The hues of the report, in tones that a light page and a dark one can both show."""
GREY = "#808080"


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", lambda _: draw(DOCS / "pictures"))
    return {"parallel_read_safe": True}


def draw(folder: Path) -> None:
    """Write every picture as SVG."""
    folder.mkdir(exist_ok=True)
    pictures: Mapping[str, Callable[[], alt.Chart]] = {
        "differences": differences,
        "rates": rates,
        "frontier": frontier,
        "price": price,
    }
    for name, picture in pictures.items():
        chart = picture().configure(background="transparent").configure_view(stroke=None)
        chart = chart.configure_axis(
            labelColor=GREY, titleColor=GREY, gridColor=GREY, gridOpacity=0.25, domainColor=GREY
        )
        chart = chart.configure_legend(labelColor=GREY, titleColor=GREY).configure_header(
            labelColor=GREY, titleColor=GREY
        )
        (folder / f"{name}.svg").write_text(vl_convert.vegalite_to_svg(chart.to_dict()), encoding="utf-8")


def differences() -> alt.Chart:
    """Points over plain fine-tuning, with intervals, a row a task."""
    rows = [
        {"task": task["task"], "method": group["method"]} | _points(group["minus_none"])
        for task in _tasks("comparison")
        for group in _methods(task)
        if group["minus_none"]
    ]
    base = alt.Chart().encode(y=alt.Y("method:N", sort=list(COLOURS), title=None), color=_tint())
    bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title="points over none"), x2="high:Q")
    dots = base.mark_circle(size=45).encode(x="mean:Q")
    zero = alt.Chart().mark_rule(color=GREY, strokeDash=[3, 3]).encode(x=alt.datum(0))
    return (
        alt.layer(zero, bars, dots, data=alt.InlineData(values=rows))
        .properties(width=420, height=90)
        .facet(row=alt.Row("task:N", title=None, header=alt.Header(labelAngle=0, labelAlign="left")))
    )


def rates() -> alt.Chart:
    """Accuracy against learning rate."""
    rows = [
        {"method": point["method"], "rate": point["value"], "accuracy": 100 * point["accuracy"]}
        for task in _tasks("curves")
        for point in task["sweeps"]
        if point["key"] == "lr" and point["accuracy"] is not None
    ]
    swept = sorted({row["rate"] for row in rows})
    x = alt.X(
        "rate:Q",
        title="learning rate",
        scale=alt.Scale(type="log", domain=[swept[0], swept[-1]]),
        axis=alt.Axis(format=".0e", grid=False, values=swept),
    )
    return _lines(rows, x, alt.Y("mean(accuracy):Q", title="test accuracy, %"))


def frontier() -> alt.Chart:
    """Accuracy against retention, a line of interpolations for each method."""
    rows = [
        {"method": group["method"], "alpha": point["alpha"], "task": task["task"]}
        | {name: 100 * point[name] for name in ("accuracy", "retention")}
        for task in _tasks("curves")
        for group in _methods(task)
        for point in group["interpolations"]
    ]
    x = alt.X("retention:Q", title="retention, %", scale=alt.Scale(zero=False))
    y = alt.Y("accuracy:Q", title="test accuracy, %", scale=alt.Scale(zero=False))
    chart = _lines(rows, x, y, order="alpha:Q", width=250)
    return chart.facet(column=alt.Column("task:N", title=None)).resolve_scale(x="independent", y="independent")


def price() -> alt.Chart:
    """What the program of the tutorial prints: new digits learned against old ones kept, by radius."""
    program = "\n".join(
        re.findall(r"^```python\n(.*?)^```$", (DOCS / "tutorial.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program, "tutorial.md", "exec"), {})  # noqa: S102 - the page is ours
    found = re.findall(r"radius ([\d.]+): ([\d.]+)% of the new digits, ([\d.]+)% of the old", printed.getvalue())
    rows = [{"radius": f"radius {radius}", "new": float(new), "old": float(old)} for radius, new, old in found]
    x = alt.X("old:Q", title="old digits kept, %", scale=alt.Scale(zero=False))
    y = alt.Y("new:Q", title="new digits learned, %", scale=alt.Scale(zero=False))
    base = alt.Chart(alt.InlineData(values=rows)).encode(x=x, y=y)
    labels = base.mark_text(align="left", dx=8, dy=-6, color=GREY).encode(text="radius:N")
    line = base.mark_line(point={"color": COLOURS["mars-pgm"]}, color=COLOURS["mars-pgm"])
    return alt.layer(line, labels).properties(width=420, height=240)


def _lines(rows: list[dict[str, Any]], x: alt.X, y: alt.Y, *, order: str | None = None, width: int = 420) -> alt.Chart:
    chart = alt.Chart(alt.InlineData(values=rows)).mark_line(point=True, strokeWidth=2)
    chart = chart.encode(x=x, y=y, color=_tint(), **({"order": order} if order else {}))
    return chart.properties(width=width, height=240)


def _tint() -> alt.Color:
    return alt.Color("method:N", title=None, scale=alt.Scale(domain=list(COLOURS), range=list(COLOURS.values())))


def _tasks(kind: str) -> Iterator[Mapping[str, Any]]:
    for path in sorted((DOCS / "results").glob(f"{kind}*.json")):
        yield from json.loads(path.read_text("utf-8"))["tasks"]


def _methods(task: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return task["settings"][0]["methods"]


def _points(difference: Mapping[str, Any]) -> dict[str, float]:
    low, high = difference["interval"]
    return {"mean": 100 * difference["mean"], "low": 100 * low, "high": 100 * high}
