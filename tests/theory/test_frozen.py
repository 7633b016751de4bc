"""The complexity of a head on frozen features: draws against all signs, and the formula against a search of heads."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tethertune.theory import ClippedCrossEntropy, CrossEntropy, Ramp
from tethertune.theory.frozen import Draws
from tethertune.theory.losses import Scores

torch.set_num_threads(1)


def drawn(features, labels, classes, batch=None):
    draws = Draws(classes, features.shape[1], torch.device("cpu"))
    for x, y in zip(features.split(batch or len(features)), labels.split(batch or len(labels)), strict=True):
        draws.add(x, y)
    return draws.result()


def all_signs(count):
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=count)), dtype=torch.float64)


def expectation(features, labels, classes):
    """T as its definition says, over all signs."""
    signs = all_signs(len(features))
    whole = (signs @ features).abs().amax(1)
    own = sum((signs[:, labels == k] @ features[labels == k]).abs().amax(1) for k in range(classes))
    return float((classes * whole + own).mean())


def sample(count, size, classes, seed, mean=0.0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, size, dtype=torch.float64, generator=generator) + mean
    return features, torch.randint(classes, (count,), generator=generator)


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99), st.sampled_from([0.0, 2.0]))
@settings(deadline=None, max_examples=40)
def test_draws_and_massart_bound_the_expectation(count, size, classes, seed, mean):
    features, labels = sample(count, size, classes, seed, mean)
    exact = expectation(features, labels, classes)
    found = drawn(features, labels, classes)
    assert found.draws == 8192
    assert exact <= found.massart * (1 + 1e-12)
    assert abs(exact - found.mean) <= found.spread * math.sqrt(math.log(1e6))
    assert exact <= math.exp(found.log_bound(1e-6)) * (1 + 1e-12)
    assert (
        found.log_bound(0.5) <= found.log_bound(1e-6) <= found.log_bound(None) == pytest.approx(math.log(found.massart))
    )


def test_one_sign_moves_a_draw_by_no_more_than_mcdiarmid_is_told():
    features, labels = sample(6, 3, 3, 0)
    signs = all_signs(6)

    def value(s):
        own = sum(float((s[labels == k] @ features[labels == k]).abs().amax()) for k in range(3))
        return 3 * float((s @ features).abs().amax()) + own

    for i in range(6):
        flipped = signs.clone()
        flipped[:, i] *= -1
        most = max(abs(value(a) - value(b)) for a, b in zip(signs, flipped, strict=True))
        assert most <= 4 * 2 * float(features[i].abs().amax()) + 1e-12
    spread = 4 * math.sqrt(2 * float(features.abs().amax(1).square().sum()) / 8192)
    assert drawn(features, labels, 3).spread == pytest.approx(spread, rel=1e-12)


def test_the_size_of_a_batch_changes_nothing():
    features, labels = sample(9000, 3, 2, 0, mean=1.0)
    whole = drawn(features, labels, 2)
    for batch in (64, 4096, 5000):
        found = drawn(features, labels, 2, batch)
        assert (found.mean, found.massart, found.spread) == pytest.approx(
            (whole.mean, whole.massart, whole.spread), rel=1e-12
        )


def test_draws_are_worth_it_where_features_have_a_mean():
    """As after a ReLU: one sum of signs carries most of every entry, and no maximum over entries is paid for."""
    features, labels = sample(2000, 256, 4, 0)
    found = drawn(features.relu() + 1, labels, 4)
    assert math.exp(found.log_bound(5e-4)) < 0.6 * found.massart


def test_many_classes_and_entries_get_fewer_draws_and_never_a_worse_bound():
    features, labels = sample(8, 4096, 100, 0)
    found = drawn(features, labels, 100)
    assert found.draws == 16
    assert found.log_bound(1e-4) <= found.log_bound(None)


def test_features_that_are_zero_cost_nothing():
    found = drawn(torch.zeros(5, 3), torch.zeros(5, dtype=torch.long), 2)
    assert found.log_bound(0.01) == found.log_bound(None) == -math.inf


@pytest.mark.parametrize("loss", [Ramp(0.5), Ramp(4.0), ClippedCrossEntropy(), CrossEntropy(6.0)], ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_head_exceeds_the_bound(loss, seed):
    """Every sign and a fine grid of heads: the complexity itself, nearly, against ``slope B_V T / m``."""
    count, classes, bound = 7, 3, 1.5
    features, labels = sample(count, 1, classes, seed, mean=0.5)
    grid = torch.linspace(-bound, bound, 13, dtype=torch.float64)
    heads = torch.cartesian_prod(grid, grid, grid)
    losses = torch.empty(len(heads), count, dtype=torch.float64)
    for i in range(count):
        scores = Scores()
        scores.add(heads * features[i], labels[i].expand(len(heads)))
        losses[:, i] = loss.values(scores)
    complexity = float((losses @ all_signs(count).T).amax(0).mean()) / count
    proven = loss.slope * bound * expectation(features, labels, classes) / count
    assert 0 < complexity <= proven
    maurer = math.sqrt(2) * loss.lipschitz * classes * bound
    root = float(features.square().sum().sqrt()) * math.sqrt(2 * math.log(2)) / count
    assert proven <= maurer * root
