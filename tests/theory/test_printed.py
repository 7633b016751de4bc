import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tethertune.errors import ConfigurationError
from tethertune.theory import Layer, certificate, printed

LAYERS = [Layer(2.0, 1.0), Layer(4.0, 1.0)]
COMMON = {"head_bound": 1.0, "samples": 100, "classes": 2}

numbers = st.floats(1e-3, 1e3)
chains = st.lists(st.builds(Layer, numbers, st.just(0.0) | numbers), min_size=1, max_size=6)


def theorem2(layers, **changes):
    return printed.theorem2(layers, **{**COMMON, "input_dim": 8, "input_bound": 1.0, **changes})


def theorem3(layers, **changes):
    return printed.theorem3(layers, **{**COMMON, "input_bound": 2.0, **changes})


def test_worked_numbers():
    assert theorem2(LAYERS).value == pytest.approx(15.985048534227795, rel=1e-9)
    assert theorem3(LAYERS).value == pytest.approx(9.6, rel=1e-9)
    common = {"samples": 100, "parameters": 50, "input_bound": 2.0}
    assert printed.bartlett(LAYERS, two_one_distances=[1, 1], **common).value == pytest.approx(
        6.512639170664346, rel=1e-9
    )
    assert printed.long_sedghi(LAYERS, **common).value == pytest.approx(22.627416997969522, rel=1e-9)


def test_equations_6_and_7_are_of_the_gap_and_the_theorems_of_the_complexity():
    common = {"samples": 100, "parameters": 50, "input_bound": 2.0}
    equations = (printed.bartlett(LAYERS, two_one_distances=[1, 1], **common), printed.long_sedghi(LAYERS, **common))
    assert [bound.about for bound in (*equations, theorem2(LAYERS), theorem3(LAYERS))] == ["gap"] * 2 + [
        "complexity"
    ] * 2


def test_everything_printed_says_so():
    for bound in (theorem2(LAYERS), theorem3(LAYERS)):
        assert bound.kind == "printed"
        assert "as printed" in bound.name


@given(chains, numbers, st.integers(2, 10**6))
def test_the_log_path_equals_the_direct_one(layers, head_bound, dim):
    ratios = sum(layer.distance / layer.bound for layer in layers)
    product = math.prod(2 * layer.bound for layer in layers)
    direct = 2 * math.sqrt(math.log(2 * dim)) * 2 * head_bound * ratios * product / 10
    found = theorem2(layers, head_bound=head_bound, input_dim=dim)
    assert found.value == pytest.approx(direct, rel=1e-9)
    direct = math.sqrt(4) * 2 * head_bound * ratios * product / 10
    assert theorem3(layers, head_bound=head_bound).value == pytest.approx(direct, rel=1e-9)


@given(chains, st.integers(0, 5), st.floats(1.0, 10.0))
def test_no_distance_and_no_norm_makes_it_smaller(layers, position, factor):
    j = position % len(layers)
    layer = layers[j]
    wider = [*layers[:j], Layer(layer.bound, layer.distance * factor), *layers[j + 1 :]]
    larger = [*layers[:j], Layer(layer.bound * factor, layer.distance), *layers[j + 1 :]]
    for theorem in (theorem2, theorem3):
        before = theorem(layers).log10
        for changed in (wider, larger):
            assert theorem(changed).log10 >= before - 1e-12


@given(chains, st.floats(1.0, 100.0))
def test_linear_in_what_multiplies_it(layers, factor):
    base = theorem2(layers).log10
    shift = math.log10(factor)
    for changes in (
        {"head_bound": factor},
        {"input_bound": factor},
        {"lipschitz": factor},
        {"samples": 100 / factor**2},
    ):
        assert theorem2(layers, **changes).log10 == pytest.approx(base + shift, abs=1e-9)
    assert theorem2(layers, classes=6).log10 == pytest.approx(base + math.log10(3), abs=1e-9)


def test_without_distances_the_printed_bounds_are_zero():
    frozen = [Layer(2.0, 0.0)] * 3
    for bound in (theorem2(frozen), theorem3(frozen)):
        assert (bound.log10, bound.value) == (-math.inf, 0.0)
        assert bound.is_upper_bound is None


def test_a_dead_layer_divides_nothing_by_zero():
    assert theorem2([Layer(0.0, 1.0), Layer(2.0, 0.5)]).value == pytest.approx(
        theorem2([Layer(1.0, 1.0), Layer(2.0, 0.0)]).value, rel=1e-12
    )
    assert theorem2([Layer(0.0, 0.0), Layer(2.0, 0.5)]).value == 0


@pytest.mark.parametrize("distance", [0.0, 0.01])
def test_counterexample_to_both_theorems(distance):
    """One layer, one input entry, W0 = 1, V in [-1, 1], l(z) = z: the complexity is known exactly."""
    m = 64
    mean_abs = sum(math.comb(m, k) * abs(m - 2 * k) for k in range(m + 1)) / 2**m
    exact = (1 + distance) * mean_abs / m
    layers = [Layer(1 + distance, distance)]
    common = {"head_bound": 1, "samples": m, "classes": 1, "input_bound": 1}
    for claimed in (printed.theorem2(layers, input_dim=1, **common), printed.theorem3(layers, **common)):
        assert claimed.value < exact / 20
        assert claimed.is_upper_bound is None
    proven = certificate.distance(
        layers, head_bound=1, samples=m, classes=1, dims=[1, 1], alphas=[1.0, 1.0], lipschitz=1.0
    )
    assert proven.value >= exact
    assert certificate.product(layers, input_dim=1, lipschitz=1.0, **common).value >= exact


def test_deep_networks_are_flagged_as_bounds_after_all():
    deep = [Layer(2.0, 0.1)] * 20
    assert theorem2(deep).is_upper_bound is True
    assert theorem3(deep).is_upper_bound is True


def test_deep_networks_do_not_overflow():
    deep = [Layer(50.0, 1.0)] * 400
    common = {"samples": 100, "parameters": 10**6, "input_bound": 1.0}
    for bound in (
        theorem2(deep),
        theorem3(deep),
        printed.bartlett(deep, two_one_distances=[1.0] * 400, **common),
        printed.long_sedghi(deep, **common),
    ):
        assert 600 < bound.log10 < 900
        assert bound.value is None


def test_a_head_is_included_by_appending_it():
    with_head = printed.long_sedghi([*LAYERS, Layer(3.0, 3.0)], samples=100, parameters=50, input_bound=2.0)
    assert with_head.value == pytest.approx(math.sqrt(0.5) * 2 * 5 * 24, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Layer(1.0, -1.0), "Layer distance"),
        (lambda: Layer(math.nan, 1.0), "Layer bound"),
        (lambda: theorem2(LAYERS, head_bound=0.0), "head_bound=0.0"),
        (lambda: theorem2(LAYERS, samples=0), "samples=0"),
        (lambda: theorem3(LAYERS, input_bound=-1.0), "input_bound"),
        (
            lambda: printed.bartlett(LAYERS, samples=1, parameters=2, input_bound=1, two_one_distances=[1]),
            "1 two_one_distances given for 2 layers",
        ),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ConfigurationError, match=says):
        call()
