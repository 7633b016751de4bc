import math

import pytest
import torch

from tethertune import norms, projections
from tethertune.kernels import exact

torch.set_num_threads(1)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
PROJECTIONS = [projections.l1_rows, projections.l1_rows_euclidean]


def bits(W):
    return W.contiguous().view(INTEGERS[W.element_size()])


def l1(W, centre):
    return norms.row_sums(W.double() - centre.double())


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_inside_near_the_definition_and_untouched_inside(dtype, projection, generator):
    centre = torch.randn(400, 60, generator=generator).to(dtype)
    W = (centre.double() + torch.randn(400, 60, generator=generator).double() * 0.02).to(dtype)
    before = l1(W, centre)
    radius = before * torch.rand(400, generator=generator).double().mul(2)  # about half of the rows are outside
    result, broken = exact.rows(W, centre, radius, projection)
    assert (l1(result, centre) <= radius).all()
    assert not broken.any()
    inside = before <= radius
    assert 0 < inside.sum() < 400
    assert torch.equal(bits(result[inside]), bits(W[inside]))
    expected = centre.double() + projection(W.double() - centre.double(), radius)
    largest = torch.maximum(expected.abs(), centre.double().abs()).clamp(min=1e-3)
    assert ((result.double() - expected).abs() <= 1.5 * torch.finfo(dtype).eps * largest + 1e-12).all()
    again, _ = exact.rows(result, centre, radius, projection)
    assert torch.equal(bits(again), bits(result))


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_rows_that_are_not_finite_are_left_and_told(projection):
    W = torch.tensor([[math.nan, 5.0], [math.inf, 5.0], [5.0, 5.0]])
    result, broken = exact.rows(W, torch.zeros(3, 2), torch.ones(3).double(), projection)
    assert broken.tolist() == [True, True, False]
    assert torch.equal(bits(result[:2]), bits(W[:2]))
    assert l1(result, torch.zeros(3, 2))[2] <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_radius_is_the_centre(dtype, generator):
    centre = torch.randn(20, 7, generator=generator).to(dtype)
    W = centre + 1
    result, _ = exact.rows(W, centre, torch.zeros(20).double(), projections.l1_rows)
    assert torch.equal(result, centre)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 0.3, 0.999, 1.0])
def test_scaled_stays_within_its_share(dtype, scale, generator):
    centre = torch.randn(30, 5, 3, generator=generator).to(dtype)
    W = centre + torch.randn(30, 5, 3, generator=generator).to(dtype) * 0.05
    T = W.double() - centre.double()
    budget = scale**2 * T.square().sum()
    result = exact.scaled(W, centre, torch.tensor(scale * (1 - 1e-12), dtype=torch.float64), budget)
    assert result.shape == W.shape
    assert result.dtype == dtype
    reached = (result.double() - centre.double()).square().sum()
    assert reached <= budget * (1 + 1e-14)
    assert reached >= budget * (1 - 8 * torch.finfo(dtype).eps - 1e-11)


def test_nothing_waits_for_the_device():
    """On the meta device a look from the host raises, as it would stall an accelerator."""
    W = torch.empty(8, 4, device="meta")
    radius = torch.ones(8, dtype=torch.float64, device="meta")
    for projection in PROJECTIONS:
        result, broken = exact.rows(W, W, radius, projection)
        assert result.shape == W.shape
        assert broken.shape == (8,)
    assert exact.scaled(W, W, radius[0], radius[0]).shape == W.shape
