import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tethertune.errors import ConfigurationError
from tethertune.theory.bounds import Bound, Layer, log, log_sum, positive, to_log10, to_value


def test_values_beyond_300_digits_are_none():
    assert (to_value(299.0), to_value(301.0), to_value(-301.0), to_value(-math.inf)) == (1e299, None, None, 0.0)
    assert Bound("x", 2.0, "printed").value == 100
    assert log_sum([]) == -math.inf


@given(st.lists(st.floats(-700, 700), min_size=1, max_size=5))
def test_a_sum_of_logarithms_is_the_logarithm_of_the_sum(terms):
    scaled = [math.exp(term - max(terms)) for term in terms]
    assert log_sum(terms) == pytest.approx(max(terms) + math.log(sum(scaled)), rel=1e-12, abs=1e-12)
    assert log_sum([term + 1e5 for term in terms]) == pytest.approx(log_sum(terms) + 1e5, rel=1e-12)


def test_logarithms_of_nothing():
    assert log(0.0) == -math.inf
    assert log_sum([-math.inf, -math.inf]) == -math.inf
    assert log_sum([-math.inf, 1.0]) == 1.0
    assert to_log10(math.log(1000)) == pytest.approx(3)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_an_argument_that_must_be_positive_is_named(value):
    with pytest.raises(ConfigurationError, match=f"radius={value}: it must be a finite number above 0"):
        positive(radius=value)


@pytest.mark.parametrize("values", [(-1.0, 0.0), (1.0, -1.0), (math.inf, 0.0), (1.0, math.nan)])
def test_a_layer_is_of_finite_numbers(values):
    with pytest.raises(ConfigurationError, match="it must be a finite number, 0 or more"):
        Layer(*values)
