"""The figures of ``tethertune bounds``: how each bound grows, and the norms that it grows with."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import altair as alt

from tethertune.errors import ConfigurationError
from tethertune.lab import files
from tethertune.lab.growth import Growth, Point, Sweep
from tethertune.lab.report import drawing, formats, page
from tethertune.lab.report.drawing import Chart, Figure, Key, colour
from tethertune.lab.report.tables import Cell, Table

__all__ = ["check_output", "figures", "setting", "write"]

_AXES: dict[Sweep, tuple[str, str]] = {
    "depth": ("Depth", "linear maps"),
    "width": ("Width", "factor of all channels"),
    "resolution": ("Resolution", "side of the images, pixels"),
    "distance": ("Distance", "part of its own norm that each layer may move by"),
}
_COLOURS = {
    "Theorem 2 (as printed)": colour("mars-pgm"),
    "product bound": colour("mars-sp"),
    "distance bound": colour("delta"),
    "Theorem 3 (as printed)": colour("l2-pgm"),
    "Eq. 6, Bartlett et al. (as printed)": colour("other"),
    "Eq. 7, Long and Sedghi (as printed)": colour("none"),
}
_NORMS = {
    "mars": Key("MARS", colour("mars-pgm"), drawing.DASHES[0]),
    "kernel_mars": Key("MARS of the kernel", colour("mars-sp"), drawing.DASHES[1]),
    "frobenius": Key("Frobenius", colour("l2-pgm"), drawing.DASHES[0]),
    "two_one": Key("(2,1)", colour("other"), drawing.DASHES[0]),
    "spectral": Key("spectral, upper bound", colour("none"), drawing.DASHES[0]),
}


def check_output(output: str | PathLike[str]) -> Path:
    """The file of the page, before the work begins that is to be written to it.

    Raises:
        ConfigurationError: It is a folder, or its name does not end in ``.html``.
    """
    path = Path(output)
    if path.is_dir() or path.suffix.lower() not in (".html", ".htm"):
        raise ConfigurationError(f"--output {path} is no HTML file: name the file to write, such as bounds.html.")
    return path


def write(growth: Growth, output: str | PathLike[str]) -> Path:
    """Write the figures as one HTML page that needs no network; the same numbers make the same bytes.

    Raises:
        ConfigurationError: See :func:`check_output`.
    """
    path = check_output(output)
    text = page.html(
        "growth.html.j2",
        title="How generalisation bounds grow",
        setting=setting(growth),
        figures=figures(growth),
    )
    files.write_text(path, text)
    return path


def setting(growth: Growth) -> str:
    """What all numbers have in common, in words."""
    weights = f"random weights, seed {growth.seed}" if growth.weights == "random" else f"weights of {growth.weights}"
    return (
        f"Resolution and distance: {growth.model}, {weights}. Depth and width: ResNets with random weights, seed "
        f"{growth.seed}. Where that is not what is changed, each layer may move by {growth.distance:g} of its norm, "
        f"in the norm of each bound, and images have {growth.size} pixels a side. The head's ball has radius 1. "
        f"{growth.samples} images of Fashion-MNIST in 10 classes, a loss with Lipschitz constant 1. All are bounds of "
        "the generalisation gap without the confidence term: twice the complexity where they are of the complexity."
    )


def figures(growth: Growth) -> list[Figure]:
    """The bounds along every sweep, and the norms along every sweep in which the network changes."""
    proven = growth.points[0].proven
    names = list(growth.points[0].bounds)
    keys = [Key(name, _COLOURS[name], drawing.DASHES[0 if name in proven else 1]) for name in names]
    sweeps = [name for name in _AXES if growth.sweep(name)]
    changing = [name for name in sweeps if name != "distance"]
    return [
        Figure(
            "How each bound grows",
            f"log10 of each bound. Full lines are proven; dashed ones are {formats.AS_PRINTED}, and Equations 6 and 7 "
            "leave out constants and the head.",
            [_chart(growth.sweep(name), name, keys, "bounds", "log10 of the bound of the gap") for name in sweeps],
            _table("log10 of each bound of the gap", growth, sweeps, keys, "bounds"),
            keys,
        ),
        Figure(
            "How the norms grow",
            "log10 of each norm of the layers' linear maps, mean over the body's layers. The Frobenius and (2,1) norms "
            "grow with the resolution. The MARS norm does not, once the smallest feature map holds a whole kernel: "
            "below that no row has all its entries. The MARS norm of the kernel, which the constraint bounds, is the "
            "same at every resolution.",
            [
                _chart(growth.sweep(name), name, list(_NORMS.values()), "norms", "log10 of the norm")
                for name in changing
            ],
            _table("log10 of each norm, mean over the layers", growth, changing, list(_NORMS.values()), "norms"),
            list(_NORMS.values()),
        ),
    ]


def _values(point: Point, what: str) -> dict[str, float]:
    """What is drawn of a point, by the label of its line."""
    return dict(point.bounds) if what == "bounds" else {_NORMS[name].label: x for name, x in point.norms.items()}


def _chart(points: Sequence[Point], sweep: Sweep, keys: Sequence[Key], what: str, title: str) -> Chart:
    name, axis = _AXES[sweep]
    rows = [
        {
            "series": label,
            "x": drawing.significant(point.x),
            "log10": drawing.significant(value),
            "network": point.network,
        }
        for point in points
        for label, value in _values(point, what).items()
    ]
    kind = "log" if sweep in ("distance", "width") else "linear"
    scale = alt.Scale(type=kind, zero=False, nice=False)
    form = "~e" if sweep == "distance" else "~r"
    x = alt.X("x:Q", title=axis, scale=scale, axis=alt.Axis(format=form, tickCount=5, grid=False))
    y = alt.Y("log10:Q", title=title, scale=alt.Scale(zero=False))
    tooltip = [alt.Tooltip("series:N", title="what"), "network:N", alt.Tooltip("x:Q", title=axis), "log10:Q"]
    chart = drawing.choosable(*drawing.lines(rows, keys, x=x, y=y, tooltip=tooltip))
    first, last = _values(points[0], what), _values(points[-1], what)
    told = "; ".join(
        f"{key.label} {formats.number(first[key.label])} to {formats.number(last[key.label])}" for key in keys
    )
    description = f"{title} by {axis}, from {points[0].x:g} to {points[-1].x:g}: {told}."
    return Chart(name, drawing.spec(chart, description, 260))


def _table(caption: str, growth: Growth, sweeps: Sequence[Sweep], keys: Sequence[Key], what: str) -> Table:
    rows = [
        [
            Cell(f"{sweep} {point.x:.3g}"),
            Cell(point.network),
            *(Cell(formats.number(_values(point, what)[key.label], ".2f")) for key in keys),
        ]
        for sweep in sweeps
        for point in growth.sweep(sweep)
    ]
    return Table(caption, ("What is changed", "Network", *(key.label for key in keys)), rows)
