import math

import pytest

from tethertune.errors import ConfigurationError
from tethertune.theory import Layer, comparators

LAYERS = [Layer(2.0, 1.0), Layer(4.0, 1.0)]


def test_explicit_comparators():
    layers = [*LAYERS, Layer(1.0, 1.0)]
    common = {"samples": 100, "input_bound": 2.0}
    total = (0.5 ** (2 / 3) + 0.25 ** (2 / 3) + 1) ** 1.5 * 8
    expected = 8 / 1000 + 36 * math.log(100) * math.sqrt(math.log(2 * 64)) * 2 * total / 10
    found = comparators.bartlett_explicit(layers, max_width=8, two_one_distances=[1, 1, 1], **common)
    assert found.value == pytest.approx(expected, rel=1e-12)
    steps = 10**5
    integral = sum(math.sqrt(math.log(3 * steps / (k + 0.5))) for k in range(steps)) / steps
    assert integral == pytest.approx(1.41573, abs=2e-5)
    found = comparators.long_sedghi_explicit(layers, parameters=50, **common)
    assert found.value == pytest.approx(24 * integral * math.sqrt(0.5) * 2 * (0.5 + 0.25 + 1) * 8, rel=1e-6)
    assert found.about == "gap"


def test_other_comparators():
    found = comparators.neyshabur_pac_bayes(
        LAYERS, samples=100, max_width=8, input_bound=2.0, frobenius_distances=[1.0, 3.0]
    )
    expected = math.sqrt(4 * 4 * 8 * math.log(16) * 64 * (1 / 4 + 9 / 16) / 100)
    assert found.value == pytest.approx(expected, rel=1e-12)
    found = comparators.neyshabur_two_layers(
        head_rows=[1.0, 2.0],
        row_distances=[0.5, 0.0],
        frozen_responses=[3.0, 1.0],
        samples=10,
        classes=2,
        data_norm=4.0,
    )
    assert found.value == pytest.approx((2 * 2 + 2) / 10 * (1 * (2 + 3) + 2 * 1), rel=1e-12)
    found = comparators.golowich_frobenius(LAYERS, samples=100, input_bound=2.0)
    assert found.value == pytest.approx((math.sqrt(4 * math.log(2)) + 1) * 8 * 2 / 10, rel=1e-12)
    found = comparators.golowich_rows(LAYERS, samples=100, input_dim=8, input_alpha=0.5)
    assert found.value == pytest.approx(2 * 8 * math.sqrt(3 + math.log(8)) * 0.5 / 10, rel=1e-12)
    assert {found.kind, found.is_upper_bound} == {"comparator", None}


def test_a_comparator_wants_one_distance_for_each_layer():
    with pytest.raises(ConfigurationError, match="given for 2 layers"):
        comparators.bartlett_explicit(LAYERS, samples=10, max_width=8, input_bound=1.0, two_one_distances=[1.0])
