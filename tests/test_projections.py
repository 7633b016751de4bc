import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tethertune import norms, projections

torch.set_num_threads(1)

L1 = [projections.l1_rows, projections.l1_rows_euclidean]
EVERY = [*L1, projections.frobenius]
entries = st.one_of(st.floats(-1e3, 1e3), st.floats(-1e-3, 1e-3), st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-300]))
matrices = st.tuples(st.integers(1, 4), st.integers(1, 6)).flatmap(
    lambda shape: st.lists(
        st.lists(entries, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
    ).map(lambda rows: torch.tensor(rows, dtype=torch.float64))
)
radii = st.one_of(st.floats(1e-3, 1e3), st.sampled_from([0.0, 1.0, math.inf]))
properties = settings(deadline=None, max_examples=150)


def distance(projection, T):
    return norms.frobenius(T) if projection is projections.frobenius else norms.mars(T)


def by_bisection(T, radius):
    """The Euclidean projection of each row: soft thresholding, with the threshold found by halving an interval."""
    size = T.abs()
    low, high = torch.zeros(len(T), 1, dtype=T.dtype), size.amax(1, keepdim=True)
    for _ in range(200):
        middle = (low + high) / 2
        outside = (size - middle).clamp(min=0).sum(1, keepdim=True) > radius
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    shrunk = T.sign() * (size - high).clamp(min=0)
    return torch.where(size.sum(1, keepdim=True) > radius, shrunk, T)


def test_worked_numbers():
    T = torch.tensor([[3.0, -1.0]])
    radial, euclidean = projections.l1_rows(T, 2.0), projections.l1_rows_euclidean(T, 2.0)
    assert radial.tolist() == [[1.5, -0.5]]
    assert euclidean.tolist() == [[2.0, 0.0]]
    assert norms.mars(T - radial) == norms.mars(T - euclidean) == 2


def test_frobenius_by_hand():
    T = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    torch.testing.assert_close(projections.frobenius(T, 1.0), torch.tensor([[0.6, 0.0], [0.0, -0.8]]))


def test_fixed_points_differ():
    """Minimise 2 x + y over the l1 ball by projected gradient steps: the radial projection stops short."""
    slope = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    ends = {}
    for projection in L1:
        x = torch.zeros(1, 2, dtype=torch.float64)
        for _ in range(100):
            x = projection(x - 0.5 * slope, 1.0)
        ends[projection] = x
    torch.testing.assert_close(ends[projections.l1_rows], torch.tensor([[-2 / 3, -1 / 3]], dtype=torch.float64))
    torch.testing.assert_close(ends[projections.l1_rows_euclidean], torch.tensor([[-1.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("projection", EVERY)
@given(T=matrices, radius=radii)
@properties
def test_feasible_idempotent_and_identity_inside(projection, T, radius):
    projected = projection(T, radius)
    assert projected.shape == T.shape
    assert distance(projection, projected) <= radius * (1 + 1e-14)
    torch.testing.assert_close(projection(projected, radius), projected, rtol=1e-14, atol=0)
    inside = norms.row_sums(T) <= radius if projection in L1 else (norms.frobenius(T) <= radius).expand(len(T))
    assert torch.equal(projected[inside].view(torch.int64), T[inside].view(torch.int64))


@pytest.mark.parametrize("projection", EVERY)
@given(T=matrices, radius=radii)
@properties
def test_odd_and_preserving_signs_and_order_and_never_growing(projection, T, radius):
    projected = projection(T, radius)
    assert torch.equal(projection(-T, radius), -projected)
    assert (projected * T >= 0).all()
    assert (projected.abs() <= T.abs()).all()
    order = T.abs().argsort(dim=1)
    assert (projected.abs().gather(1, order).diff(dim=1) >= 0).all()


@pytest.mark.parametrize("projection", EVERY)
@given(T=matrices, radius=st.floats(1e-3, 1e3), factor=st.floats(1e-3, 1e3))
@properties
def test_homogeneous_in_displacement_and_radius_together(projection, T, radius, factor):
    tolerance = 1e-9 * factor * radius  # a radius of a millionth of T leaves that many of float64's digits
    torch.testing.assert_close(
        projection(factor * T, factor * radius), factor * projection(T, radius), rtol=0, atol=tolerance
    )


@given(T=matrices, radius=st.floats(1e-3, 1e3))
@properties
def test_both_l1_maps_attain_the_l1_distance_and_the_euclidean_one_the_l2_distance(T, radius):
    radial, euclidean = (projection(T, radius) for projection in L1)
    nearest = (norms.row_sums(T) - radius).clamp(min=0)
    for projected in (radial, euclidean):
        torch.testing.assert_close(norms.row_sums(T - projected), nearest, rtol=1e-12, atol=1e-12 * radius)
    for row, one, other in zip(T, radial, euclidean, strict=True):
        assert norms.frobenius(row - other) <= norms.frobenius(row - one) * (1 + 1e-12)
        assert norms.frobenius(other) >= norms.frobenius(one) * (1 - 1e-12)


@given(T=matrices, radius=st.floats(1e-3, 1e3))
@properties
def test_euclidean_against_bisection(T, radius):
    expected = by_bisection(T, radius)
    torch.testing.assert_close(projections.l1_rows_euclidean(T, radius), expected, rtol=0, atol=1e-11 * max(1, radius))


@pytest.mark.parametrize("projection", [projections.l1_rows_euclidean, projections.frobenius])
@given(T=matrices, seed=st.integers(0, 10**6), radius=st.floats(1e-3, 1e3))
@properties
def test_nearest_points_are_nonexpansive(projection, T, seed, radius):
    other = T + torch.randn(T.shape, generator=torch.Generator().manual_seed(seed), dtype=T.dtype)
    moved = norms.frobenius(projection(T, radius) - projection(other, radius))
    assert moved <= norms.frobenius(T - other) * (1 + 1e-12)


def test_radial_is_not_nonexpansive():
    """Its l1 Lipschitz constant is 2, approached at a vertex (Thele 1974); in l2 it grows with the columns."""
    epsilon = 1e-6
    a, b = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[1.0, epsilon]]).double()
    stretch = norms.mars(projections.l1_rows(a, 1.0) - projections.l1_rows(b, 1.0)) / norms.mars(a - b)
    assert stretch == pytest.approx(2, rel=1e-5)
    vertex = torch.zeros(1, 100, dtype=torch.float64)
    vertex[0, 0] = 1
    beside = vertex + epsilon
    moved = projections.l1_rows(vertex, 1.0) - projections.l1_rows(beside, 1.0)
    assert norms.frobenius(moved) > 9 * norms.frobenius(vertex - beside)


@pytest.mark.parametrize("projection", EVERY)
def test_a_zero_radius_leaves_nothing_and_an_infinite_one_everything(projection):
    T = torch.tensor([[1.0, -2.0], [0.0, 0.0]])
    assert not projection(T, 0.0).any()
    assert torch.equal(projection(T, math.inf), T)
    assert not projection(torch.zeros(2, 3), 0.0).any()
    assert not projection(torch.full((1, 1), 1e-310, dtype=torch.float64), 0.0).any()


@pytest.mark.parametrize("projection", EVERY)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_project(projection, shape):
    assert projection(torch.ones(shape), 1.0).shape == shape


@pytest.mark.parametrize("projection", L1)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_left(projection, value):
    T = torch.tensor([[value, 5.0], [5.0, 5.0]])
    projected = projection(T, 1.0)
    assert torch.equal(projected[0], T[0]) or (math.isnan(value) and projected[0, 0].isnan() and projected[0, 1] == 5)
    assert norms.row_sums(projected)[1] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_layer_that_is_not_finite_is_left(value):
    T = torch.tensor([[value, 5.0], [5.0, 5.0]])
    assert torch.equal(projections.frobenius(T, 1.0).isfinite(), T.isfinite())
    assert projections.frobenius(T, 1.0)[1].tolist() == [5, 5]


@pytest.mark.parametrize("projection", L1)
def test_each_row_may_have_a_radius_of_its_own(projection):
    T = torch.tensor([[4.0, -4.0], [4.0, -4.0], [4.0, -4.0]])
    radius = torch.tensor([2.0, 0.0, math.inf])
    assert projection(T, radius).tolist() == [[1, -1], [0, 0], [4, -4]]


@pytest.mark.parametrize("projection", EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_displacements_at_the_end_of_the_range(projection, dtype):
    """Sums overflow the dtype, and radius / sum underflows it; the result does neither."""
    T = torch.full((2, 4), torch.finfo(dtype).max, dtype=dtype)
    expected = projection(T.double(), 1.0)
    projected = projection(T, 1.0)
    assert projected.dtype == dtype
    torch.testing.assert_close(projected.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("projection", L1)
@pytest.mark.parametrize("excess", [1e3, 1e8, 1e15, 1e20])
def test_far_outside_nothing_is_lost(projection, excess):
    T = torch.randn(50, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * excess
    sums = norms.row_sums(projection(T, 1.0))
    assert (sums <= 1 + 1e-14).all()
    assert (sums >= 1 - 1e-12).all()
