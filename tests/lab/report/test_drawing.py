import json
import math
import re
from importlib import resources

import altair as alt
import pytest
import vl_convert
from hypothesis import given, settings
from hypothesis import strategies as st

from tethertune.lab.methods import METHODS
from tethertune.lab.report import drawing

X, Y = alt.X("place:Q"), alt.Y("mean:Q")
KEYS = drawing.legend({"plain": "none", "held": "mars-pgm"})
ROWS = [{"series": label, "place": place, "mean": place / 2} for label in ("plain", "held") for place in (1, 2, 3)]


def drawn(rows, **options):
    chart = drawing.choosable(*drawing.lines(rows, KEYS, x=X, y=Y, tooltip=["series:N"], **options))
    return drawing.spec(chart, "Two lines.", 260)


def test_every_method_has_a_light_and_a_dark_colour_and_no_two_have_the_same():
    style = resources.files("tethertune.lab.report").joinpath("templates", "style.css").read_text(encoding="utf-8")
    values = {}
    for method in [*METHODS, "of a later version"]:
        (variable,) = re.fullmatch(r"var\((.*)\)", drawing.colour(method)).groups()
        values[variable] = re.findall(rf"{variable}:\s*([^;]+);", style)
        assert len(values[variable]) == 2
    assert len({light for light, _ in values.values()}) == len({dark for _, dark in values.values()}) == len(values)
    assert drawing.colour("of a later version") == drawing.colour("other")


@given(st.dictionaries(st.text(), st.sampled_from([*METHODS])))
def test_a_legend_keeps_order_and_colour_and_tells_up_to_four_of_a_method_apart_by_their_dashes(series):
    keys = drawing.legend(series)
    assert [key.label for key in keys] == list(series)
    assert [key.colour for key in keys] == [drawing.colour(method) for method in series.values()]
    for method in METHODS:
        dashes = [tuple(key.dash) for key in keys if key.colour == drawing.colour(method)]
        assert len({*dashes}) == min(len(dashes), 4)
        assert dashes[:1] in ([], [(1, 0)])


def test_methods_that_share_a_colour_differ_in_their_dashes():
    keys = drawing.legend({"a": "of a later version", "b": "of another", "c": "none"})
    assert [key.colour for key in keys[:2]] == [drawing.colour("other")] * 2
    assert keys[0].dash != keys[1].dash
    assert keys[2].dash == keys[0].dash


def test_a_specification_draws_a_line_and_a_dot_for_each_row():
    svg = vl_convert.vegalite_to_svg(drawn(ROWS) | {"width": 300})
    assert svg.count('aria-roledescription="line mark"') == len(KEYS)
    assert svg.count('aria-roledescription="circle"') == len(ROWS)


def test_a_specification_takes_the_pages_width_and_theme():
    spec = drawn(ROWS)
    assert (spec["width"], spec["height"], spec["description"]) == ("container", 260, "Two lines.")
    assert "config" not in spec
    assert drawn(ROWS) == spec == json.loads(json.dumps(spec, allow_nan=False))


@pytest.mark.parametrize("order", [None, "step:Q"])
def test_lines_go_along_the_axis_unless_another_order_is_given(order):
    rows = [{"series": "held", "place": place, "mean": 0.5, "step": step} for step, place in enumerate((1, 3, 2))]
    svg = vl_convert.vegalite_to_svg(drawn(rows, order=order) | {"width": 300})
    (path,) = re.findall(r'aria-roledescription="line mark"[^>]* d="M([^"]*)"', svg)
    across = [float(point.split(",")[0]) for point in path.split("L")]
    assert (across == sorted(across)) == (order is None)
    assert len(across) == 3


def test_a_mark_without_data_is_left_out():
    band = alt.Chart(drawing.data([])).mark_area().encode(x=X, y=Y)
    kept = drawing.layered(band, *drawing.lines(ROWS, KEYS, x=X, y=Y, tooltip=[])).to_dict()
    assert [layer["mark"]["type"] for layer in kept["layer"]] == ["line", "circle"]


def test_the_legend_can_bring_a_series_out():
    spec = drawn(ROWS)
    assert [(parameter["name"], parameter["value"]) for parameter in spec["params"]] == [("chosen", "")]
    assert {layer["encoding"]["opacity"]["condition"]["test"] for layer in spec["layer"]} == {drawing.CHOSEN}


@pytest.mark.parametrize(
    ("label", "lines"),
    [
        ("mars-pgm", ["mars-pgm"]),
        ("mars-pgm (radius 0.5)", ["mars-pgm", "radius 0.5"]),
        ("mars-pgm (radius 0.5, head pool, lr 0.1)", ["mars-pgm", "radius 0.5", "head pool", "lr 0.1"]),
    ],
)
def test_a_label_takes_up_the_lines_that_are_counted(label, lines):
    chart = alt.Chart(drawing.data([{"name": label, "value": 1}])).mark_bar()
    chart = chart.encode(x="value:Q", y=alt.Y("name:N", axis=drawing.label_axis()))
    text = re.findall(
        r"<tspan[^>]*>([^<]*)</tspan>|<text[^>]*>([^<]+)</text>", vl_convert.vegalite_to_svg(chart.to_dict())
    )
    found = [first or second for first, second in text]
    assert [each for each in found if each in lines] == lines
    assert drawing.label_lines(label) == len(lines)


@given(st.floats())
def test_rounded_is_within_half_a_hundredth_and_null_where_json_has_no_word(value):
    found = drawing.rounded(value)
    assert (found is None) == (not math.isfinite(value))
    assert found is None or abs(found - value) <= 0.005 * (1 + 1e-6)
    json.dumps(found, allow_nan=False)


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False))
def test_six_significant_digits_are_kept(value):
    assert drawing.significant(value) == pytest.approx(value, rel=5.01e-6)
    assert len(repr(drawing.significant(value)).partition("e")[0].replace(".", "").strip("-0")) <= 6
