"""The bounds of one class of networks, put together, beside the printed ones."""

import itertools
import math

import pytest
import torch
from torch import nn

from tethertune.theory import Layer, Ramp, operator_norms, printed
from tethertune.theory.case import Case, as_printed, sizes
from tethertune.theory.classes import NetworkClass, measure
from tethertune.theory.graph import trace
from tethertune.theory.propagation import Ball
from tethertune.theory.sample import observe, tensors

torch.set_num_threads(1)
LOSS = Ramp(2.0)


def make():
    torch.manual_seed(0)
    reference = nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False), nn.ReLU(), nn.Conv2d(3, 4, 2, bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(36, 3, bias=False),
    ).double().eval()  # fmt: skip
    images, labels = torch.randn(20, 2, 6, 6, dtype=torch.float64), torch.arange(20) % 3
    network = trace(reference, images, head="5")
    state = tensors(reference)
    return reference, Case(network, observe(network, reference, state, [(images, labels)]), 5.0, 1e-3)


def classed(case, part, head_bias=0.0):
    state = tensors(make()[0])
    balls = {
        index: Ball(found.ball.reference, part * found.ball.reference)
        for index, found in measure(case.network, state, state).items()
    }
    return NetworkClass(balls, 0.5, head_bias, 0.0, ())


def test_parts_add_up_and_the_smaller_counts():
    _, case = make()
    found = case.bounds(classed(case, 0.1, head_bias=0.2), LOSS)
    for bound in (found.distance, found.perturbation):
        parts = dict(bound.parts)
        assert 10 ** parts["frozen"] + 10 ** parts["moved"] == pytest.approx(bound.value, rel=1e-12)
    assert dict(found.distance.parts)["frozen"] == dict(found.perturbation.parts)["frozen"]
    assert found.complexity is min(found.product, found.distance, key=lambda bound: bound.log10)
    assert found.all == [found.product, found.distance, found.perturbation]


def test_without_a_bound_of_the_inputs_there_is_no_perturbation_bound():
    _, case = make()
    case = Case(case.network, case.sample)
    assert case.bounds(classed(case, 0.1), LOSS).perturbation is None


def test_how_they_scale():
    _, case = make()
    choice = classed(case, 0.1)
    base = case.bounds(choice, LOSS)
    wider = case.bounds(NetworkClass(choice.balls, 1.5, 0.0, 0.0, ()), LOSS)
    steeper = case.bounds(choice, Ramp(1.0))
    for before, by_3, by_2 in zip(base.all, wider.all, steeper.all, strict=True):
        assert by_3.value == pytest.approx(3 * before.value, rel=1e-9)
        assert by_2.value == pytest.approx(2 * before.value, rel=1e-9)


def test_more_movement_is_more_and_none_is_the_frozen_part():
    _, case = make()
    found = [case.bounds(classed(case, part), LOSS) for part in (0.0, 0.01, 0.1, 1.0)]
    for one, more in itertools.pairwise(found):
        assert all(a.log10 < b.log10 for a, b in zip(one.all, more.all, strict=True))
    still = found[0]
    assert dict(still.distance.parts)["moved"] == -math.inf
    frozen = LOSS.slope * 0.5 * math.exp(case.sample.frozen.log_bound(1e-3)) / 20
    assert still.distance.value == still.perturbation.value == pytest.approx(frozen, rel=1e-12)


def test_measured_numbers_claim_nothing():
    _, case = make()
    found = case.bounds(classed(case, 0.1), LOSS)
    for proven, measured in zip(found.all, found.as_measured().all, strict=True):
        assert (proven.kind, proven.is_upper_bound) == ("certificate", True)
        assert (measured.kind, measured.is_upper_bound) == ("measurement", None)
        assert measured.log10 == proven.log10


def test_printed_bounds_are_of_the_norms_of_the_layers():
    reference, case = make()
    choice = classed(case, 0.1)
    state = tensors(reference)
    moved = {name: 1.1 * tensor for name, tensor in state.items()}
    found = sizes(case.network, moved, state)
    norms = [operator_norms(reference[0], (2, 6, 6)), operator_norms(reference[2], (3, 4, 4))]
    for mine, theirs, displaced in zip(norms, found.reference, found.moved, strict=True):
        for name in ("mars", "frobenius", "two_one", "one"):
            assert getattr(theirs, name) == pytest.approx(getattr(mine, name), rel=1e-12)
            assert getattr(displaced, name) == pytest.approx(0.1 * getattr(mine, name), rel=1e-9)
        assert theirs.spectral >= mine.spectral * (1 - 1e-12)
    assert found.parameters == sum(p.numel() for p in reference.parameters())
    assert found.head_frobenius == pytest.approx(1.1 * float(reference[5].weight.detach().norm()), rel=1e-12)
    common = {"samples": 20, "classes": 3, "lipschitz": LOSS.lipschitz}
    proven = case.bounds(choice, LOSS)
    second, third, sixth, seventh = as_printed(case, proven, found)
    balls = [Layer(ball.bound, ball.distance) for ball in choice.balls.values()]
    expected = printed.theorem2(balls, head_bound=0.5, input_dim=72, input_bound=5.0, **common)
    assert second.log10 == pytest.approx(expected.log10, abs=1e-12)
    expected = printed.theorem3(
        [Layer(1.1 * n.frobenius, 0.1 * n.frobenius) for n in norms],
        head_bound=found.head_frobenius,
        input_bound=case.sample.input_norm,
        **common,
    )
    assert third.log10 == pytest.approx(expected.log10, abs=1e-9)
    spectral = [Layer(a.spectral + d.spectral, d.spectral) for a, d in zip(found.reference, found.moved, strict=True)]
    counted = {
        "samples": 20,
        "parameters": found.parameters,
        "input_bound": case.sample.input_norm,
        "lipschitz": LOSS.lipschitz,
    }
    two_one = [0.1 * n.two_one for n in norms]
    assert sixth.log10 == pytest.approx(
        printed.bartlett(spectral, two_one_distances=two_one, **counted).log10, abs=1e-9
    )
    assert seventh.log10 == pytest.approx(printed.long_sedghi(spectral, **counted).log10, abs=1e-12)
    assert {bound.kind for bound in (second, third, sixth, seventh)} == {"printed"}


@pytest.mark.parametrize(("part", "is_bound"), [(0.0, None), (1e-6, None), (1.0, True)])
def test_theorem_2_is_flagged_where_it_is_above_a_proven_bound(part, is_bound):
    reference, case = make()
    proven = case.bounds(classed(case, part), LOSS)
    second, third, *_ = as_printed(case, proven, sizes(case.network, tensors(reference), tensors(reference)))
    assert second.is_upper_bound is is_bound
    assert is_bound is None or second.log10 >= proven.complexity.log10
    assert third.is_upper_bound is None
