import math

import pytest

from tethertune.lab.report import formats
from tethertune.lab.report.statistics import Difference, Summary


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.25, "1.2"), (-1.26, "\N{MINUS SIGN}1.3"), (math.nan, "NaN"), (math.inf, "∞"), (-math.inf, "\N{MINUS SIGN}∞")],
)
def test_number(value, text):
    assert formats.number(value) == text


def test_accuracies_leave_in_percent():
    assert formats.accuracy(0.7561) == "75.6 %"
    assert formats.accuracy(math.nan) == "NaN"
    assert formats.spread(Summary(0.7561, 0.0391, 3)) == "75.6 ± 3.9 %"
    assert formats.spread(Summary(0.7561, math.nan, 1)) == "75.6 %"
    assert formats.spread(Summary(math.nan, math.nan, 2)) == "NaN"


def test_differences_leave_in_points_with_their_sign():
    assert formats.points(0.0441) == "+4.4"
    assert formats.points(-0.0441) == "\N{MINUS SIGN}4.4"
    assert formats.interval(Difference({1: 0.0, 2: 0.1}, 0.05, (-0.01, 0.1))) == "\N{MINUS SIGN}1.0 to +10.0"
    assert formats.interval(Difference({1: 0.0}, 0.0, None)) == "-"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(47.6, "48 s"), (59.7, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (math.nan, "NaN")],
)
def test_duration(seconds, text):
    assert formats.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (False, "no"),
        (3e-4, "0.0003"),
        (12, "12"),
        ("pool", "pool"),
        ([1, 2], "1, 2"),
        ((), "-"),
    ],
)
def test_value(value, text):
    assert formats.value(value) == text


def test_fields():
    assert (
        formats.fields({"head": "pool", "lr": 3e-4, "batch_size": 32})
        == "head pool, learning rate 0.0003, batch size 32"
    )
