"""Each family of linear maps against the dense matrix that its weight makes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tethertune.theory.maps import Convolution, Dense, Diagonal, Separable
from tethertune.theory.taps import Axis

torch.set_num_threads(1)
random = torch.Generator().manual_seed(0)


def rand(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=random)


def convolution_matrix(geometry, weight):
    blocks = []
    for kernel in weight.chunk(geometry.groups):
        block = torch.einsum("oiuv,yuh,xvw->oyxihw", kernel, geometry.vertical.matrix(), geometry.horizontal.matrix())
        blocks.append(block.flatten(3).flatten(0, 2))
    matrix = torch.block_diag(*blocks)
    return matrix.T if geometry.transposed else matrix


PLAIN = Convolution(Axis(5, 3, 1, 1, 1, 1), Axis(4, 3, 2, 1, 1, 1))
MAPS = {
    "dense": (Dense(3), (4, 5), lambda w: torch.block_diag(w, w, w)),
    "diagonal": (Diagonal(4), (3,), lambda w: torch.diag(w.repeat_interleave(4))),
    "separable": (Separable(rand(2, 4), rand(3, 5), 2), (), None),
    "convolution": (PLAIN, (4, 3, 3, 3), None),
    "groups": (Convolution(Axis(4, 3, 1, 1, 1, 1), Axis(4, 2), groups=2), (4, 2, 3, 2), None),
    "circular": (
        Convolution(Axis(3, 3, 1, 2, 2, 2, "circular"), Axis(4, 3, 1, 1, 1, 1, "circular")),
        (2, 2, 3, 3),
        None,
    ),
    "transposed": (Convolution(Axis(5, 3, 2, 1, 1, 1), Axis(5, 3, 2, 1, 1, 1), 1, True), (3, 2, 3, 3), None),
}


def dense(name, weight):
    geometry, _, build = MAPS[name]
    if isinstance(geometry, Separable):
        return weight * torch.kron(torch.eye(geometry.channels), torch.kron(geometry.vertical, geometry.horizontal))
    return build(weight) if build else convolution_matrix(geometry, weight)


@pytest.mark.parametrize("name", MAPS)
def test_norms_are_those_of_the_matrix(name):
    geometry, shape, _ = MAPS[name]
    weight = rand(*shape)
    matrix = dense(name, weight)
    found = geometry.norms(weight)
    assert found.mars == pytest.approx(float(matrix.abs().sum(1).max()), rel=1e-12)
    assert found.one == pytest.approx(float(matrix.abs().sum(0).max()), rel=1e-12)
    assert found.frobenius == pytest.approx(float(matrix.norm()), rel=1e-12)
    assert found.two_one == pytest.approx(float(matrix.norm(dim=1).sum()), rel=1e-12)
    assert found.spectral_is == "exact"
    assert found.spectral == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-9)
    assert geometry.mars(weight) == pytest.approx(found.mars, rel=1e-15)
    assert found.mars <= found.kernel_mars * (1 + 1e-12)
    fast = geometry.norms(weight, "fast")
    assert fast.spectral >= found.spectral * (1 - 1e-12)
    assert (fast.mars, fast.frobenius, fast.one, fast.two_one) == (
        found.mars,
        found.frobenius,
        found.one,
        found.two_one,
    )


@pytest.mark.parametrize("name", MAPS)
@given(factor=st.floats(-3, 3))
@settings(deadline=None, max_examples=10)
def test_a_displacement_obeys_the_triangle_inequality(name, factor):
    geometry, shape, _ = MAPS[name]
    old, new = rand(*shape), rand(*shape)
    assert geometry.mars(factor * old) == pytest.approx(abs(factor) * geometry.mars(old), rel=1e-12)
    assert abs(geometry.mars(new) - geometry.mars(old)) <= geometry.mars(new - old) * (1 + 1e-12)
    assert geometry.mars(new) <= geometry.mars(old) + geometry.mars(new - old) * (1 + 1e-12)


def test_sums_over_rows_and_columns_are_placed_as_the_maps_are():
    weight = rand(4, 3, 3, 3)
    matrix = convolution_matrix(PLAIN, weight)
    rows, row_squares, columns, column_squares = PLAIN.sums(weight)
    assert rows.shape == (4, 5, 2)
    assert columns.shape == (3, 5, 4)
    assert torch.allclose(rows.flatten(), matrix.abs().sum(1))
    assert torch.allclose(row_squares.flatten(), matrix.square().sum(1))
    assert torch.allclose(columns.flatten(), matrix.abs().sum(0))
    assert torch.allclose(column_squares.flatten(), matrix.square().sum(0))


def test_norms_scale():
    found = Dense().norms(rand(3, 4))
    twice = found.scaled(2.0)
    assert (twice.mars, twice.frobenius, twice.spectral) == (2 * found.mars, 2 * found.frobenius, 2 * found.spectral)
    assert twice.spectral_is == found.spectral_is


def test_a_large_matrix_is_bounded_fast_and_exact_at_best():
    weight = rand(600, 700) / 20
    true = float(torch.linalg.matrix_norm(weight, 2))
    best, fast, guess = (Dense().norms(weight, effort) for effort in ("best", "fast", "estimate"))
    assert (best.spectral_is, fast.spectral_is, guess.spectral_is) == ("exact", "upper", "estimate")
    assert best.spectral == pytest.approx(true, rel=1e-9)
    assert guess.spectral <= true * (1 + 1e-12)
    assert true <= fast.spectral <= math.sqrt(fast.mars * fast.one)
