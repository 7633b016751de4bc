import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tethertune.lab.report import curves
from tethertune.lab.report.curves import Axis, Measure
from tethertune.lab.report.drawing import legend
from tethertune.lab.report.statistics import Summary, summarise

SHARE, SIZE = Measure("Test accuracy"), Measure("Gradient norm", is_share=False)
KEYS = legend({"none": "none", "mars": "mars-pgm"})
shares = st.lists(st.floats(0, 1), min_size=1, max_size=5)
sizes = st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=5)


def layers(chart):
    """The rows that each mark of a chart draws."""
    spec = chart.spec
    return [spec["datasets"][layer.get("data", spec.get("data"))["name"]] for layer in spec["layer"]]


@given(shares)
def test_the_band_of_a_share_is_in_percent_around_the_mean_and_never_beyond_0_and_100(values):
    row = SHARE.row(summarise(values))
    assert row["mean"] == pytest.approx(100 * sum(values) / len(values), abs=0.006)
    if len(values) == 1:
        assert row["low"] is row["high"] is None
    else:
        assert 0 <= row["low"] <= row["mean"] <= row["high"] <= 100


@given(sizes)
def test_the_band_of_a_size_has_a_place_on_a_log_axis(values):
    row = SIZE.row(summarise(values))
    assert row["mean"] == pytest.approx(sum(values) / len(values), rel=1e-5)
    if len(values) > 1:
        assert 0 < row["low"] <= row["mean"] <= row["high"]
        assert row["low"] >= 0.0999 * row["mean"]
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize(
    ("measure", "summary", "text", "drawn"),
    [
        (SHARE, Summary(0.756, 0.039, 3), "75.6 ± 3.9", True),
        (SHARE, Summary(0.756, math.nan, 1), "75.6", True),
        (SHARE, Summary(0.0, 0.0, 3), "0.0 ± 0.0", True),
        (SHARE, Summary(math.nan, math.nan, 3), "NaN", False),
        (SIZE, Summary(12.345, 0.567, 3), "12.3 ± 0.57", True),
        (SIZE, Summary(12.345, math.nan, 1), "12.3", True),
        (SIZE, Summary(0.0, 0.0, 3), "0 ± 0", False),
        (SIZE, Summary(math.nan, math.nan, 2), "NaN", False),
    ],
)
def test_a_table_says_what_a_chart_may_have_no_place_for(measure, summary, text, drawn):
    assert measure.text(summary) == text
    assert measure.is_drawn(summary) == drawn
    [[place, cell]] = curves.table("", Axis("epoch"), [("none", measure, {1: summary})]).rows
    assert (place.text, cell.text) == ("1", text)
    chart = curves.curve(Axis("epoch"), measure, {"none": {1: summary}}, KEYS, "")
    assert (chart is not None) == drawn


def test_a_line_has_a_dot_for_each_place_and_a_band_where_there_is_a_deviation():
    paths = {
        "mars": {1: Summary(0.5, 0.1, 3), 2: Summary(0.6, math.nan, 1)},
        "none": {2: Summary(math.nan, math.nan, 2)},
    }
    band, line, dots = layers(curves.curve(Axis("epoch"), SHARE, paths, KEYS, "mars rises"))
    assert line == dots
    assert [(row["series"], row["place"], row["mean"]) for row in line] == [("mars", 1, 50.0), ("mars", 2, 60.0)]
    assert [(row["place"], row["low"], row["high"]) for row in band] == [(1, 40.0, 60.0)]


def test_of_one_seed_there_is_a_line_without_a_band():
    chart = curves.curve(Axis("epoch"), SHARE, {"none": {1: Summary(0.5, math.nan, 1)}}, KEYS, "")
    assert len(layers(chart)) == 2


def test_a_chart_is_told_to_who_cannot_see_it():
    chart = curves.curve(Axis("epoch"), SHARE, {"none": {1: Summary(0.5, 0.1, 2)}}, KEYS, "none ends at 50 %")
    assert chart.spec["description"] == "Test accuracy by epoch, mean over seeds: none ends at 50 %."


@settings(deadline=None)
@given(st.sets(st.integers(1, 99), min_size=1, max_size=12))
def test_few_places_are_the_ticks_and_many_are_not(places):
    axis = Axis("epoch").encoding([*places, *places]).to_dict()["axis"]
    assert axis.get("values") == (sorted(places) if len(places) <= 6 else None)


def test_log_axes_are_where_they_are_asked_for():
    def scales(axis, measure):
        chart = curves.curve(axis, measure, {"none": {1e-3: Summary(0.5, 0.1, 2)}}, KEYS, "")
        return {
            tuple(layer["encoding"][name]["scale"].get("type", "linear") for name in "xy")
            for layer in chart.spec["layer"]
        }

    assert scales(Axis("learning rate", log=True), SHARE) == {("log", "linear")}
    assert scales(Axis("epoch"), SIZE) == {("linear", "log")}


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 9), shares), st.dictionaries(st.integers(0, 9), sizes))
def test_a_table_has_every_place_of_any_column_once_and_in_order(accuracies, norms):
    columns = [
        ("accuracy", SHARE, {place: summarise(values) for place, values in accuracies.items()}),
        ("norm", SIZE, {place: summarise(values) for place, values in norms.items()}),
    ]
    found = curves.table("Both", Axis("epoch"), iter(columns))
    assert found.columns == ("Epoch", "accuracy", "norm")
    assert [int(row[0].text) for row in found.rows] == sorted({*accuracies, *norms})
    for place, *cells in found.rows:
        for cell, (_, _, path) in zip(cells, columns, strict=True):
            assert (cell.text == "-") == (int(place.text) not in path)
