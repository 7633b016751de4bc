import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tethertune.lab.report.statistics import bootstrap_interval, paired, ranks, summarise


def test_mean_and_sample_deviation_by_hand():
    summary = summarise([2.0, 4.0, 4.0, 6.0])

    assert summary.mean == 4
    assert summary.deviation == pytest.approx(math.sqrt(8 / 3))
    assert summary.count == 4


def test_one_value_has_no_deviation_and_none_has_no_mean():
    assert summarise([0.5]).mean == 0.5
    assert math.isnan(summarise([0.5]).deviation)
    assert math.isnan(summarise([]).mean)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_not_averaged_away(bad):
    summary = summarise([0.7, bad])

    assert math.isnan(summary.mean)
    assert math.isnan(summary.deviation)
    assert summary.count == 2


@pytest.mark.parametrize("values", [[1.0, 3.0], [1.0, 2.0, 6.0]])
def test_interval_of_two_or_three_values_is_their_range(values):
    # the smallest alone is drawn with probability 1/4 or 1/27, more than the tail of 1/40
    assert bootstrap_interval(values) == (min(values), max(values))


def test_interval_by_hand():
    # the resampled mean is a quarter of a Binomial(4, 1/4): P(<= 2/4) = 0.949, P(<= 3/4) = 0.996
    assert bootstrap_interval([0.0, 0.0, 0.0, 1.0]) == (0.0, 0.75)


def test_interval_of_many_values_is_near_the_normal_one():
    values = [float(value) for value in range(400)]
    summary = summarise(values)
    half = 1.96 * summary.deviation / math.sqrt(400)

    low, high = bootstrap_interval(values)

    assert low == pytest.approx(summary.mean - half, abs=0.1 * half)
    assert high == pytest.approx(summary.mean + half, abs=0.1 * half)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8))
def test_interval_lies_in_the_range_and_repeats(values):
    low, high = bootstrap_interval(values, resamples=200)

    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
    assert (low, high) == bootstrap_interval(values, resamples=200)


def test_difference_takes_common_seeds_only():
    difference = paired({1: 0.7, 2: 0.8, 5: 0.9}, {2: 0.75, 1: 0.6, 4: 0.1})

    assert difference.by_seed == pytest.approx({1: 0.1, 2: 0.05})
    assert list(difference.by_seed) == [1, 2]
    assert difference.mean == pytest.approx(0.075)
    assert difference.interval == pytest.approx((0.05, 0.1))


def test_difference_of_one_seed_has_no_interval():
    difference = paired({1: 0.9}, {1: 0.1})

    assert difference.interval is None
    assert not difference.beyond_noise


def test_no_common_seed_is_no_difference():
    assert paired({1: 0.9}, {2: 0.1}) is None


@pytest.mark.parametrize("ours", [{1: 0.7, 2: 0.6, 3: 0.7}, {1: 0.65, 2: 0.65, 3: 0.7}])
def test_an_interval_that_touches_zero_is_noise(ours):
    assert not paired(ours, dict.fromkeys((1, 2, 3), 0.65)).beyond_noise


@pytest.mark.parametrize("ours", [0.6, 0.8])
def test_a_clear_gain_or_loss_of_three_seeds_is_beyond_noise(ours):
    assert paired(dict.fromkeys((1, 2, 3), ours), {1: 0.69, 2: 0.7, 3: 0.71}).beyond_noise


def test_two_seeds_are_not_enough_to_be_beyond_noise():
    difference = paired({1: 0.8, 2: 0.8}, {1: 0.69, 2: 0.7})

    assert difference.leaves_out_zero
    assert not difference.beyond_noise


def test_a_difference_to_a_run_without_accuracy_is_not_finite():
    difference = paired({1: 0.7, 2: 0.8}, {1: math.nan, 2: 0.7})

    assert math.isnan(difference.mean)
    assert difference.interval is None


def test_ranks_by_hand():
    assert ranks({"a": 0.5, "b": 0.7, "c": 0.5, "d": 0.1}) == {"a": 2.5, "b": 1, "c": 2.5, "d": 4}
    assert ranks({}) == {}


@given(st.dictionaries(st.text(max_size=3), st.sampled_from((0.1, 0.2, 0.3)), min_size=1))
def test_ranks_add_up_and_fall_as_values_rise(values):
    found = ranks(values)

    assert sum(found.values()) == pytest.approx(len(values) * (len(values) + 1) / 2)
    assert all((found[a] < found[b]) == (values[a] > values[b]) for a in values for b in values)
