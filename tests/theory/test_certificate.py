import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tethertune.errors import ConfigurationError
from tethertune.theory import Layer, calculus, certificate

LAYERS = [Layer(2.0, 1.0), Layer(4.0, 1.0)]
COMMON = {"head_bound": 1.0, "samples": 100, "classes": 2, "lipschitz": 1.0}
DIMS, ALPHAS = [8, 4, 2], [1.0, 0.5, 0.25]

distances = st.just(0.0) | st.floats(1e-3, 1e2)
balls = st.builds(lambda kept, moved: Layer(kept + moved, moved), st.floats(1e-2, 1e2), distances)


@st.composite
def cases(draw):
    layers = draw(st.lists(balls, min_size=1, max_size=5))
    size = len(layers) + 1
    dims = draw(st.lists(st.integers(1, 1000), min_size=size, max_size=size))
    alphas = draw(st.lists(st.floats(1e-3, 1e2), min_size=size, max_size=size))
    return layers, dims, alphas


def distance(case, **changes):
    layers, dims, alphas = case
    return certificate.distance(layers, **{**COMMON, "dims": dims, "alphas": alphas, **changes})


def product(layers, **changes):
    return certificate.product(layers, **{**COMMON, "input_dim": 8, "input_bound": 1.0, **changes})


def test_worked_numbers():
    assert product(LAYERS).value == pytest.approx(6.525868737080377, rel=1e-9)
    assert certificate.frobenius_product(LAYERS, input_bound=2.0, **COMMON).value == pytest.approx(6.4, rel=1e-9)
    bound = distance((LAYERS, DIMS, ALPHAS))
    assert bound.value == pytest.approx(4.501123240332284, rel=1e-9)
    assert 10 ** dict(bound.parts)["frozen"] == pytest.approx(0.11774100225154746, rel=1e-9)
    assert math.exp(certificate.output_shift(LAYERS, input_bound=1.0)) == pytest.approx(5, rel=1e-9)
    assert certificate.confidence(100, 0.05) == pytest.approx(0.40743045472218586, rel=1e-12)
    pairs = [(tail.v, tail.a) for tail in certificate.chain(LAYERS, dims=DIMS, alphas=ALPHAS, samples=100)]
    expected = [
        (10, 2.772588722239781),
        (10, 4.852030263919617),
        (45, 4.543964850337419),
        (45, 5.93025921145731),
    ]
    for found, wanted in zip(pairs, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-9)


def test_the_perturbation_bound_is_its_two_parts():
    bound = certificate.perturbation(
        LAYERS, features_dim=2, features_alpha=0.25, input_bound=1.0, sup_lipschitz=2.0, **COMMON
    )
    assert bound.value == pytest.approx(0.11774100225154746 + 2 * 5, rel=1e-9)


@given(cases(), st.integers(0, 4), st.floats(1.0, 10.0))
def test_no_radius_makes_it_smaller(case, position, factor):
    layers, dims, alphas = case
    j = position % len(layers)
    layer = layers[j]
    wider = Layer(layer.bound + layer.distance * (factor - 1), layer.distance * factor)
    larger = Layer(layer.bound * factor, layer.distance)
    for other in (wider, larger):
        changed = [*layers[:j], other, *layers[j + 1 :]]
        assert distance((changed, dims, alphas)).log10 >= distance(case).log10 - 1e-12
        assert product(changed).log10 >= product(layers).log10 - 1e-12
        assert (
            certificate.output_shift(changed, input_bound=1.0)
            >= certificate.output_shift(layers, input_bound=1.0) - 1e-9
        )


@given(cases(), st.floats(1.0, 100.0))
def test_how_they_scale(case, factor):
    shift = math.log10(factor)
    layers = case[0]
    for changes in ({"head_bound": factor}, {"lipschitz": factor}, {"samples": 100 / factor**2}):
        assert distance(case, **changes).log10 == pytest.approx(distance(case).log10 + shift, abs=1e-9)
        assert product(layers, **changes).log10 == pytest.approx(product(layers).log10 + shift, abs=1e-9)
    assert distance(case, classes=6).log10 == pytest.approx(distance(case).log10 + math.log10(3), abs=1e-9)


@given(cases())
def test_without_distances_only_the_frozen_part_is_left(case):
    layers, dims, alphas = case
    bound = distance(([Layer(layer.bound, 0.0) for layer in layers], dims, alphas))
    assert dict(bound.parts)["moved"] == -math.inf
    assert bound.value == pytest.approx(2 * 2 * alphas[-1] * math.sqrt(math.log(2 * dims[-1]) / 100), rel=1e-9)


@given(cases(), st.integers(0, 5))
def test_a_fixed_identity_in_between_changes_nothing(case, position):
    layers, dims, alphas = case
    tail = calculus.ZERO
    with_identity = calculus.ZERO
    for j, layer in enumerate(layers):
        source = calculus.sub_gaussian(math.log(layer.distance * alphas[j]) if layer.distance else -math.inf, dims[j])
        if j == position:
            with_identity = calculus.mix((with_identity.scaled(0.0), calculus.ZERO))
        tail = calculus.mix((tail.scaled(math.log(layer.bound)), source))
        with_identity = calculus.mix((with_identity.scaled(math.log(layer.bound)), source))
    assert (with_identity.log_v, with_identity.a) == pytest.approx((tail.log_v, tail.a), rel=1e-12)


@given(st.lists(balls, min_size=1, max_size=6))
def test_the_output_shift_is_the_difference_of_products(layers):
    direct = math.prod(layer.bound for layer in layers) - math.prod(layer.bound - layer.distance for layer in layers)
    shift = certificate.output_shift(layers, input_bound=1.0)
    scale = math.prod(layer.bound for layer in layers)
    assert math.exp(shift) == pytest.approx(direct, rel=1e-6, abs=1e-12 * scale)


def test_a_tiny_shift_does_not_cancel_to_nothing():
    layers = [Layer(1.0 + 1e-18, 1e-18)]
    assert math.exp(certificate.output_shift(layers, input_bound=1.0)) == pytest.approx(1e-18, rel=1e-9)


def test_deep_networks_do_not_overflow():
    layers = [Layer(50.0, 1.0)] * 400
    case = (layers, [10] * 401, [1.0] * 401)
    assert 600 < distance(case).log10 < 800
    assert distance(case).value is None
    assert 600 < product(layers).log10 < 800
    assert math.isfinite(certificate.output_shift(layers, input_bound=1.0))


def test_dead_layers():
    dead = [Layer(0.0, 0.0), Layer(2.0, 1.0)]
    assert product(dead).value == 0
    assert distance((dead, DIMS, ALPHAS)).value > 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: certificate.confidence(100, 0.0), "delta=0.0"),
        (lambda: certificate.confidence(100, 1.0), "delta=1.0"),
        (lambda: certificate.confidence(0, 0.05), "samples=0"),
        (lambda: distance((LAYERS, DIMS[:2], ALPHAS)), "one more than layers"),
        (lambda: distance((LAYERS, DIMS, ALPHAS), head_bound=-1.0), "head_bound"),
        (lambda: certificate.output_shift([Layer(1.0, 2.0)], input_bound=1.0), "mars"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ConfigurationError, match=says):
        call()
