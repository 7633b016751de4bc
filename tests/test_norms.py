import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tethertune import norms

torch.set_num_threads(1)


def matrix(seed, rows, columns, dtype=torch.float64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_worked_numbers():
    T = torch.tensor([[3.0, -1.0], [0.0, 2.0]])
    assert norms.row_sums(T).tolist() == [4, 2]
    assert norms.mars(T).item() == 4
    assert norms.frobenius(T).item() == pytest.approx(math.sqrt(14))


@pytest.mark.parametrize("norm", [norms.mars, norms.frobenius])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_of_nothing_is_zero(norm, shape):
    value = norm(torch.ones(shape))
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert value == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_overflows_the_dtype_does_not_overflow_the_norm(dtype):
    largest = torch.finfo(dtype).max if dtype != torch.float64 else 1e150
    T = torch.full((2, 4), largest, dtype=dtype)
    assert norms.row_sums(T).tolist() == [4 * float(largest)] * 2
    assert norms.frobenius(T).item() == pytest.approx(math.sqrt(8) * float(largest), rel=1e-12)


@pytest.mark.parametrize("norm", [norms.mars, norms.frobenius])
def test_a_large_layer_in_float32_keeps_its_digits(norm):
    T = matrix(0, 2, 1 << 20, torch.float32)
    assert norm(T).item() == pytest.approx(norm(T.double()).item(), rel=1e-13)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(value):
    T = torch.tensor([[1.0, 2.0], [value, 1.0]])
    assert norms.row_sums(T)[0] == 3
    assert not norms.mars(T).isfinite()
    assert not norms.frobenius(T).isfinite()


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6))
@settings(deadline=None, max_examples=50)
def test_inequalities_between_the_norms(seed, rows, columns):
    T = matrix(seed, rows, columns)
    largest_row = T.square().sum(1).sqrt().max()
    mars, frobenius = norms.mars(T), norms.frobenius(T)
    assert largest_row <= mars * (1 + 1e-12)
    assert mars <= math.sqrt(columns) * largest_row * (1 + 1e-12)
    assert frobenius <= math.sqrt(rows) * largest_row * (1 + 1e-12)
    spectral = torch.linalg.svdvals(T)[0]
    assert mars <= math.sqrt(columns) * spectral * (1 + 1e-12)
    assert spectral <= frobenius * (1 + 1e-12)


@given(st.integers(0, 10**6), st.floats(-4, 4))
@settings(deadline=None, max_examples=50)
def test_they_are_norms(seed, factor):
    A, B = matrix(seed, 3, 5), matrix(seed + 1, 3, 5)
    for norm in (norms.mars, norms.frobenius):
        assert norm(factor * A).item() == pytest.approx(abs(factor) * norm(A).item(), rel=1e-12)
        assert norm(A + B) <= (norm(A) + norm(B)) * (1 + 1e-12)
        assert norm(A[torch.randperm(3)][:, torch.randperm(5)]).item() == pytest.approx(norm(A).item(), rel=1e-12)


@pytest.mark.parametrize("columns", [1, 127, 32768, 100_352, 524_289])
@pytest.mark.parametrize("rows", [1, 2])
def test_sums_do_not_depend_on_the_number_of_threads(rows, columns):
    T = matrix(0, rows, columns)
    with_one = norms.row_sums(T)
    assert with_one.tolist() == pytest.approx(T.abs().sum(1).tolist(), rel=1e-13)
    torch.set_num_threads(2)
    try:
        assert torch.equal(norms.row_sums(T), with_one)
    finally:
        torch.set_num_threads(1)
