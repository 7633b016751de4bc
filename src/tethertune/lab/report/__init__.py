"""The report: run folders in, one offline HTML page or one Markdown file out.

::

    runs -> grouping -> statistics -> answer, overview, tables, movement -> charts, records -> render
"""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

from tethertune.errors import ConfigurationError
from tethertune.lab import files, runs

__all__ = ["Format", "write"]

Format = Literal["html", "markdown", "json"]


def write(
    paths: Iterable[str | PathLike[str]],
    output: str | PathLike[str],
    format: Format = "html",  # noqa: A002
) -> Path:
    """Write the report of all runs in some folders.

    The same runs make the same bytes.

    Args:
        paths: Run folders, or folders above them.
        output: The file to write; replaced if it is there.
        format: ``"html"``, ``"markdown"``, or ``"json"`` for the numbers alone.

    Returns:
        The file.

    Raises:
        ConfigurationError: An unknown format, no path, or an output that is a folder.
        RunError: A path that holds no run, or a run that cannot be read.
    """
    from tethertune.lab.report import export, grouping, render

    if format not in get_args(Format):
        raise ConfigurationError(f"format={format!r} is not known: use {', '.join(get_args(Format))}.")
    output = Path(output)
    if output.is_dir():
        raise ConfigurationError(f"{output} is a folder: name the file to write, for example {output / 'report.html'}.")
    found = runs.find([Path(path) for path in paths])
    if not found:
        raise ConfigurationError("No path was given: name run folders, or a folder above them such as runs/.")
    comparisons = grouping.compare(found)
    if format == "json":
        files.write_json(output, export.document(comparisons))
    else:
        text = (render.html if format == "html" else render.markdown)(comparisons, output.parent)
        files.write_text(output, text)
    return output
