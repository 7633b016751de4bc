import io
import re
from contextlib import redirect_stdout

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tethertune.lab.growth import NORMS, Growth, Point
from tethertune.lab.growth_text import show
from tethertune.lab.report.growth import figures, setting

BOUNDS = ("Theorem 2 (as printed)", "product bound")
PLACES = (("depth", 20), ("depth", 36), ("distance", 1e-4))
logs = st.floats(-999, 999)
measured = st.tuples(st.tuples(logs, logs), st.tuples(*[logs] * len(NORMS)))


def growth(numbers, model="lite0"):
    """``numbers`` are the bounds and the norms at each of :data:`PLACES`."""
    points = []
    for place, (both, norms) in zip(PLACES, numbers, strict=True):
        named = dict(zip(NORMS, norms, strict=True)), dict(zip(BOUNDS, both, strict=True))
        points.append(Point(*place, "resnet18", 20, 1000, *named, ()))
    return Growth(model, "a wheel", 7, 16, 0.02, 128, tuple(points))


def shown(found):
    out = io.StringIO()
    with redirect_stdout(out):
        show(found)
    return out.getvalue()


def cells(line):
    return re.split(r" {2,}", line.strip())


@settings(deadline=None, max_examples=8)
@given(st.tuples(*[measured] * len(PLACES)))
def test_the_terminal_shows_every_row_of_the_figures_tables_in_their_order(numbers):
    found = growth(numbers)
    blocks = [block.splitlines() for block in shown(found).split("\n\n")[1:]]
    tables = [figure.table for figure in figures(found)]
    assert [block[0].strip() for block in blocks] == [table.caption for table in tables]
    for block, table in zip(blocks, tables, strict=True):
        assert cells(block[1]) == list(table.columns)
        assert [cells(line) for line in block[2:]] == [[cell.text for cell in row] for row in table.rows]


def test_names_begin_and_numbers_end_below_each_other():
    numbers = [((40.0, -3.25), (0.5,) * 5), ((123.5, 0.0), (10.0,) * 5), ((1.0, 38.0), (-0.5,) * 5)]
    for block in shown(growth(numbers)).split("\n\n")[1:]:
        lines = [[*re.finditer(r"\S+( \S+)*", line)] for line in block.splitlines()[1:]]
        assert len({tuple(cell.start() for cell in line[:2]) for line in lines}) == 1
        assert len({tuple(cell.end() for cell in line[2:]) for line in lines}) == 1


@pytest.mark.parametrize("model", ["lite0", "[bold]odd[/bold]"])
def test_the_setting_comes_first_and_names_are_text(model):
    found = growth([((1.0, 2.0), (0.0,) * 5)] * 3, model)
    assert " ".join(shown(found).split()).startswith(setting(found))
