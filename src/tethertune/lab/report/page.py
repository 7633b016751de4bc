"""One HTML page that needs nothing from anywhere: its style, its charts and the program that draws them are inside."""

import json
import re
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from tethertune.lab.report.drawing import colour

__all__ = ["html", "markdown"]

_PACKAGE = "tethertune.lab.report"


def html(template: str, **content: Any) -> str:
    """A page from a template that extends ``page.html.j2``."""
    return (
        _environment()
        .get_template(template)
        .render(
            **content,
            style=Markup(_text("style.css")),  # noqa: S704 - our own file
            program=Markup(_program()),  # noqa: S704 - our own file and the bundle of an installed package
        )
    )


def markdown(template: str, **content: Any) -> str:
    """A Markdown file from a template."""
    return _environment().get_template(template).render(**content)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(_PACKAGE, "templates"),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["colour"] = colour
    environment.filters["plain"] = _plain
    environment.filters["script_json"] = _script_json
    return environment


def _plain(text: str) -> str:
    """Text that Markdown takes for text, on one line."""
    return re.sub(r"([\\`*_~\[\]<>|&])", r"\\\1", " ".join(text.split()))


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
