import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tethertune.kernels.rounding import MARGIN, fit, floor, holds, step_towards

torch.set_num_threads(1)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def edges(dtype):
    """Zeros of both signs, subnormals, the numbers around every power of two, and the largest."""
    about, integer = torch.finfo(dtype), INTEGERS[dtype.itemsize]
    exponents = range(math.frexp(about.tiny)[1] - 1, math.frexp(about.max)[1], 64 if dtype == torch.float64 else 1)
    powers = torch.tensor([2.0**e for e in exponents], dtype=torch.float64).to(dtype).view(integer)
    subnormals = torch.tensor([1, 2, 3], dtype=integer)
    largest = torch.tensor([about.max], dtype=dtype).view(integer)
    positive = torch.cat([torch.zeros(1, dtype=integer), subnormals, powers - 1, powers, powers + 1, largest])
    positive = positive.view(dtype)
    return torch.cat([positive, -positive])


def every_number(dtype):
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    return numbers[numbers.isfinite()]


def nextafter(W, centre):
    """torch.nextafter, which has no float16: there by the sorted list of all its numbers."""
    if W.dtype != torch.float16:
        return torch.nextafter(W, centre)
    numbers = every_number(W.dtype).double().unique()
    at = torch.searchsorted(numbers, W.double())
    direction = torch.sign(centre.double() - W.double()).long()
    return numbers[at + direction].to(W.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_is_nextafter(dtype):
    W, centre = edges(dtype).unsqueeze(1), edges(dtype).unsqueeze(0)
    W, centre = (t.contiguous() for t in torch.broadcast_tensors(W, centre))
    step = step_towards(W, centre)
    assert step.dtype == dtype
    assert torch.equal(step, nextafter(W, centre))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("centre", [-math.inf, -1.0, 0.0, 1e-30, math.inf])
def test_a_step_from_every_16_bit_number(dtype, centre):
    W = every_number(dtype)
    step = step_towards(W, torch.full(W.shape, centre, dtype=torch.float64))
    numbers = W.double().unique()
    at = torch.searchsorted(numbers, W.double()) + torch.sign(torch.full(W.shape, centre) - W.double()).long()
    beyond = (at < 0) | (at == len(numbers))
    assert torch.equal(step[~beyond].double(), numbers[at[~beyond]])
    assert step[beyond].isinf().all()


def test_a_step_towards_a_centre_between_stored_numbers():
    W = torch.tensor([1.0, 1.0, 1.0], dtype=torch.bfloat16)
    centre = torch.tensor([1 - 1e-9, 1.0, 1 + 1e-9], dtype=torch.float64)
    assert step_towards(W, centre).tolist() == [1 - 2**-8, 1, 1 + 2**-7]


def test_a_step_of_strided_weights():
    W = torch.ones(3, 4, dtype=torch.bfloat16).t()
    assert torch.equal(step_towards(W, torch.zeros(4, 3)), torch.full((4, 3), 1 - 2**-8, dtype=torch.bfloat16))


def l1(W, centre):
    return (W.double() - centre.double()).abs().sum(1)


def squares(W, centre):
    return (W.double() - centre.double()).square().sum(1)


@pytest.mark.parametrize(("power", "measure"), [(1, l1), (2, squares)])
@pytest.mark.parametrize("centre_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 10**6), size=st.floats(-8, 1), columns=st.integers(1, 40))
@settings(deadline=None, max_examples=20)
def test_fit_keeps_its_contract(dtype, centre_dtype, power, measure, seed, size, columns):
    """A rounded point of the ball comes inside, by single steps or to the stored number nearest to the centre."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(50, columns, generator=generator, dtype=torch.float64).to(centre_dtype)
    T = torch.randn(50, columns, generator=generator, dtype=torch.float64) * 10**size
    W = (centre.double() + T).to(dtype)
    nearest = centre.to(dtype)
    budget = torch.maximum((T.abs() ** power).sum(1), measure(nearest, centre)) * (1 + MARGIN)
    fitted = fit(W, centre, budget, power)
    assert (measure(fitted, centre) <= budget).all()
    steps = (fitted == W) | (fitted == step_towards(W, centre)) | (fitted == nearest)
    assert steps.all()
    inside = measure(W, centre) <= budget
    assert torch.equal(fitted[inside].view(INTEGERS[dtype.itemsize]), W[inside].view(INTEGERS[dtype.itemsize]))


def test_fit_takes_no_more_steps_than_it_needs():
    W, centre = torch.full((1, 8), 1.0, dtype=torch.bfloat16), torch.zeros(1, 8)
    fitted = fit(W, centre, torch.tensor([8 - 2.5 * 2**-8], dtype=torch.float64), 1)
    assert fitted.tolist() == [[1 - 2**-8] * 3 + [1.0] * 5]


def test_holds_is_whether_every_number_fits():
    assert holds(torch.ones((), dtype=torch.float32), torch.ones((), dtype=torch.bfloat16))
    assert holds(torch.ones((), dtype=torch.float16), torch.ones((), dtype=torch.float16))
    assert not holds(torch.ones((), dtype=torch.bfloat16), torch.ones((), dtype=torch.float32))
    assert not holds(torch.ones((), dtype=torch.bfloat16), torch.ones((), dtype=torch.float16))


def test_floor_is_what_no_rounding_can_avoid():
    centre = torch.tensor([1 + 2**-10, 1.0])
    assert floor(torch.ones(2, dtype=torch.bfloat16), centre) == 2**-20
    assert floor(torch.ones(2), centre) == 0
