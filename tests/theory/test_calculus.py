"""The rules of the (v, a) calculus, and that each bounds what it says on random variables that are known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tethertune.theory import calculus

torch.set_num_threads(1)
tails = st.builds(calculus.Tail, st.floats(-50, 50), st.floats(0.7, 50))


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(1, 1000))
def test_the_calculus_of_a_chain_is_the_closed_form_of_the_product_bound(norms, dim):
    tail = calculus.sub_gaussian(math.log(10), dim)
    for norm in norms:
        tail = calculus.elementwise(tail.scaled(math.log(norm)), 1.0, math.log(2))
    expected = 10 * math.prod(norms) * math.sqrt(2 * (len(norms) * math.log(2) + math.log(2 * dim)))
    assert math.exp(tail.log_expectation) == pytest.approx(expected, rel=1e-9)


def test_pairs_of_nothing():
    assert calculus.mix([]) == calculus.ZERO
    assert calculus.concat([calculus.ZERO, calculus.ZERO]) == calculus.ZERO
    assert calculus.max_pool(calculus.ZERO, 4, 1.0) == calculus.ZERO
    assert calculus.elementwise(calculus.ZERO, 1.0, 1.0) == calculus.ZERO
    assert calculus.ZERO.log_expectation == -math.inf
    assert calculus.Tail(1e4, 1.0).v == math.inf


def test_concat_and_max_pool():
    a, b = calculus.Tail(1.0, 2.0), calculus.Tail(3.0, 1.0)
    assert calculus.concat((a, b, calculus.ZERO)) == calculus.Tail(3.0, 2.0 + math.log(2))
    pooled = calculus.max_pool(a, 9, 0.5)
    assert (pooled.log_v, pooled.a) == pytest.approx((1 + math.log(9), 2 + 0.5 * 4 * 0.5))


@given(st.lists(tails, min_size=1, max_size=4))
def test_a_sum_has_the_sum_of_scales_and_their_mean_of_offsets(terms):
    v = [math.exp(term.log_v - 50) for term in terms]
    mixed = calculus.mix([*terms, calculus.ZERO])
    assert math.exp(mixed.log_v - 50) == pytest.approx(sum(v), rel=1e-9)
    assert mixed.a == pytest.approx(sum(x * term.a for x, term in zip(v, terms, strict=True)) / sum(v), rel=1e-9)
    assert min(term.a for term in terms) * (1 - 1e-12) <= mixed.a <= max(term.a for term in terms) * (1 + 1e-12)


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.integers(1, 8), st.integers(1, 8), st.floats(0.01, 3))
def test_the_pairs_bound_the_exponential_moments_of_sums_of_signs(first, second, size, other, lam):
    """Two vectors of independent sums of signs, known exactly, and the sum of their sup norms (dependent or not)."""
    count = 6
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * count)
    generator = torch.Generator().manual_seed(size + 10 * other)

    def sup(scale, entries):
        rows = torch.randn(entries, count, dtype=torch.float64, generator=generator)
        rows *= scale / rows.norm(dim=1, keepdim=True)
        return (signs @ rows.T).abs().amax(1)

    both = sup(first, size), sup(second, other)
    pairs = [calculus.sub_gaussian(math.log(v), d) for v, d in ((first, size), (second, other))]
    joined = [*zip(both, pairs, strict=True), (both[0] + both[1], calculus.mix(pairs))]
    joined.append((torch.maximum(*both), calculus.concat(pairs)))
    for value, pair in joined:
        moment = float((lam * value).exp().mean().log())
        assert moment <= pair.a + lam**2 * pair.v**2 / 2 + 1e-9
        assert float(value.mean()) <= math.exp(pair.log_expectation) * (1 + 1e-12)
