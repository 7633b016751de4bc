"""The report as one HTML page that needs nothing from anywhere, or as Markdown: the same content in the same order."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from tethertune.lab.report import charts, records, tables
from tethertune.lab.report.answer import Answer, answer, tether
from tethertune.lab.report.charts import Figure
from tethertune.lab.report.grouping import Comparison
from tethertune.lab.report.records import Record, Sheet
from tethertune.lab.report.tables import Table
from tethertune.lab.runs import Run

__all__ = ["html", "markdown"]

_PACKAGE = "tethertune.lab.report"


@dataclass(frozen=True)
class _Section:
    """One comparison, ready to be printed."""

    title: str
    context: str
    answer: Answer
    tether: Sequence[str]
    results: Table | None
    held: Table | None
    figures: Sequence[Figure]
    sheets: Sequence[Sheet]
    unfinished: Sequence[Record]
    repeated: Sequence[Record]


def html(comparisons: Sequence[Comparison], home: Path) -> str:
    """One page with its style, its charts and the program that draws them inside.

    Args:
        comparisons: What to report.
        home: The folder of the page, which links to run folders are relative to.
    """
    sections, machines = _sections(comparisons, home, with_figures=True)
    template = _environment().get_template("report.html.j2")
    return template.render(
        title=_title(sections),
        sections=sections,
        machines=machines,
        colour=charts.colour,
        style=Markup(_text("style.css")),  # noqa: S704 - our own file
        program=Markup(_program()),  # noqa: S704 - our own file and the bundle of an installed package
    )


def markdown(comparisons: Sequence[Comparison], home: Path) -> str:
    """The answers, tables and commands, for where no page can be shown.

    Args:
        comparisons: What to report.
        home: The folder of the file, which links to run folders are relative to.
    """
    sections, machines = _sections(comparisons, home, with_figures=False)
    template = _environment().get_template("report.md.j2")
    return template.render(title=_title(sections), sections=sections, machines=machines)


def _sections(comparisons: Sequence[Comparison], home: Path, *, with_figures: bool) -> tuple[list[_Section], list[str]]:
    every = [run for comparison in comparisons for group in comparison.groups for run in group.runs.values()]
    every += [run for comparison in comparisons for run in (*comparison.unfinished, *comparison.repeated)]
    surroundings = records.Surroundings(home, every)
    return [_section(comparison, surroundings, with_figures=with_figures) for comparison in comparisons], (
        surroundings.described
    )


def _section(comparison: Comparison, surroundings: records.Surroundings, *, with_figures: bool) -> _Section:
    return _Section(
        title=f"{comparison.model} on {comparison.dataset}",
        context=records.context(comparison),
        answer=answer(comparison),
        tether=tether(comparison),
        results=tables.results(comparison) if comparison.settings else None,
        held=tables.held(comparison),
        figures=charts.figures(comparison) if with_figures and comparison.settings else (),
        sheets=[surroundings.sheet(comparison, group) for group in comparison.groups],
        unfinished=[surroundings.record(run, _name(run)) for run in comparison.unfinished],
        repeated=[surroundings.record(run, _name(run)) for run in comparison.repeated],
    )


def _name(run: Run) -> str:
    config = run.info["config"]
    return f"{config['method']}, seed {config['seed']}"


def _title(sections: Sequence[_Section]) -> str:
    return f"Fine-tuning {sections[0].title}" if len(sections) == 1 else f"Fine-tuning: {len(sections)} comparisons"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(_PACKAGE, "templates"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = _plain
    environment.filters["script_json"] = _script_json
    return environment


def _plain(text: str) -> str:
    """Text that Markdown takes for text, on one line."""
    return re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", " ".join(text.split()))


def _script_json(value: object) -> Markup:
    """JSON that can stand in a script element, whatever its strings hold: no tag and no comment can begin in it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))  # noqa: S704


@cache
def _program() -> str:
    """What draws the page, bundled with the Vega, Vega-Lite and Vega-Embed that it calls."""
    import vl_convert

    bundle = vl_convert.javascript_bundle(_text("page.js"))
    return re.sub(r"<(?=/script|!--)", r"\\x3c", bundle, flags=re.IGNORECASE)


def _text(name: str) -> str:
    return resources.files(_PACKAGE).joinpath("templates", name).read_text(encoding="utf-8")
