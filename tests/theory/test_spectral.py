"""Spectral norms against singular values of dense matrices, by every way that they are found."""

import math

import pytest
import torch

from tethertune.theory import spectral
from tethertune.theory.taps import Axis

torch.set_num_threads(1)


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def true_norm(kernels, vertical, horizontal):
    norms = []
    for kernel in kernels:
        matrix = torch.einsum("oiuv,yuh,xvw->oyxihw", kernel, vertical.matrix(), horizontal.matrix())
        norms.append(float(torch.linalg.matrix_norm(matrix.flatten(3).flatten(0, 2), 2)))
    return max(norms)


GEOMETRIES = {
    "zeros": (Axis(6, 3, 1, 1, 1, 1), Axis(5, 3, 1, 1, 1, 1)),
    "stride": (Axis(7, 3, 2, 1, 1, 1), Axis(6, 3, 2, 1, 1, 1)),
    "dilation": (Axis(9, 3, 1, 2, 2, 2), Axis(6, 3, 3, 1, 0, 1)),
    "one tap": (Axis(6, 1, 2), Axis(4, 1)),
    "circular": (Axis(6, 3, 1, 1, 1, 1, "circular"), Axis(4, 3, 1, 1, 1, 1, "circular")),
    "strided circular": (Axis(6, 3, 2, 1, 1, 1, "circular"), Axis(8, 4, 2, 1, 1, 1, "circular")),
    "wrapped circular": (Axis(4, 3, 1, 3, 3, 3, "circular"), Axis(4, 3, 1, 1, 1, 1, "circular")),
    "reflect": (Axis(6, 3, 1, 1, 1, 1, "reflect"), Axis(6, 3, 2, 1, 1, 1, "reflect")),
    "replicate": (Axis(5, 3, 1, 1, 1, 1, "replicate"), Axis(5, 3, 1, 1, 2, 0, "replicate")),
}


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_way_says_truly_what_it_found(monkeypatch, name, groups, small):
    if not small:
        monkeypatch.setattr(spectral, "_ENTRIES", 0)
    vertical, horizontal = GEOMETRIES[name]
    weight = rand(4, 4 // groups, vertical.kernel, horizontal.kernel)
    true = true_norm(weight.chunk(groups), vertical, horizontal)
    for effort in ("best", "fast"):
        value, status = spectral.convolution(weight, vertical, horizontal, groups, effort)
        if status == "exact":
            assert value == pytest.approx(true, rel=1e-9)
        else:
            assert status == "upper"
            assert value >= true * (1 - 1e-12)
    value, status = spectral.convolution(weight, vertical, horizontal, groups, "best")
    whole = small or name == "one tap" or "circular" in name
    assert status == ("exact" if whole else "upper")
    assert value <= 3 * true
    value, status = spectral.convolution(weight, vertical, horizontal, groups, "estimate")
    assert status == "estimate"
    assert 0.7 * true <= value <= true * (1 + 1e-9)


def test_a_kernel_longer_than_the_map_is_folded_and_not_cut(monkeypatch):
    """Dilated taps beyond the end of a circular map come round: ``fft2(kernel, shape)`` would drop them."""
    monkeypatch.setattr(spectral, "_ENTRIES", 0)
    axis = Axis(4, 3, 1, 3, 3, 3, "circular")
    weight = rand(2, 2, 3, 3)
    value, status = spectral.convolution(weight, axis, axis, 1, "best")
    assert status == "exact"
    assert value == pytest.approx(true_norm([weight], axis, axis), rel=1e-9)


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 3, 7), (2, 7, 3), (1, 1, 5), (1, 5, 1)])
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_batches_of_matrices_of_any_size(shape, scale):
    matrices = rand(*shape)
    expected = float(torch.linalg.matrix_norm(matrices, 2).max()) * scale
    assert spectral.dense(matrices * scale) == pytest.approx(expected, rel=1e-9)
    assert spectral.dense(torch.zeros(shape, dtype=torch.float64)) == 0


def test_power_iteration_comes_from_below():
    matrix = torch.diag(torch.tensor([1.0, 0.999], dtype=torch.float64))[None]
    assert 0.99 <= spectral.dense(matrix, "estimate") <= 1
    assert spectral.dense(torch.zeros(1, 2, 2, dtype=torch.float64), "estimate") == 0


def test_the_kernel_reshaped_to_rows_is_not_the_norm_of_the_operator():
    """What ``torch.nn.utils.spectral_norm`` takes for it is too small by up to the root of the number of taps."""
    axis = Axis(16, 3, 1, 1, 1, 1, "circular")
    ones = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    value, _ = spectral.convolution(ones, axis, axis, 1, "best")
    assert value == pytest.approx(9)
    assert float(torch.linalg.matrix_norm(ones.reshape(1, -1), 2)) == pytest.approx(math.sqrt(9))
