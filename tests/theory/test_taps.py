"""Positions against what PyTorch's own padding and convolution read."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tethertune.theory.taps import Axis, Taps

torch.set_num_threads(1)


@st.composite
def axes(draw, modes=("zeros", "circular", "reflect", "replicate")):
    mode = draw(st.sampled_from(modes))
    length = draw(st.integers(1, 9))
    most = {"zeros": 5, "circular": length, "reflect": length - 1, "replicate": 5}[mode]
    axis = Axis(
        length,
        draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(0, most)),
        draw(st.integers(0, most)),
        mode,
    )
    assume(axis.length + axis.before + axis.after > axis.dilation * (axis.kernel - 1))
    return axis


@given(axes())
@settings(deadline=None)
def test_the_table_is_what_a_convolution_reads(axis):
    numbered = torch.arange(1.0, axis.length + 1).view(1, 1, -1)  # 0 is padding
    mode = "constant" if axis.mode == "zeros" else axis.mode
    padded = functional.pad(numbered, (axis.before, axis.after), mode=mode)
    taps = torch.eye(axis.kernel).unsqueeze(1)
    read = functional.conv1d(padded, taps, stride=axis.stride, dilation=axis.dilation)[0].T
    assert torch.equal(axis.table(), read.long() - 1)
    assert axis.outputs == len(read)


@given(axes())
@settings(deadline=None)
def test_the_counts_are_those_of_the_matrix(axis):
    """Weights of taps that read one input add up, and each set of them is counted along rows and columns."""
    matrix = axis.matrix()  # (outputs, kernel, length)
    taps = Taps.of(axis)
    weight = torch.rand(axis.kernel, dtype=torch.float64) - 0.5
    whole = torch.einsum("oku,k->ou", matrix, weight)
    merged = taps.merged(weight, 0)
    for power in (1, 2):
        entries = merged.abs() ** power
        assert entries @ taps.rows == pytest.approx((whole.abs() ** power).sum(1), rel=1e-12, abs=1e-15)
        assert entries @ taps.columns == pytest.approx((whole.abs() ** power).sum(0), rel=1e-12, abs=1e-15)


@given(axes())
@settings(deadline=None)
def test_copies_are_the_squared_norm_of_the_padding(axis):
    padding = Axis(axis.length, 1, before=axis.before, after=axis.after, mode=axis.mode).matrix()[:, 0]
    assert axis.copies == round(float(torch.linalg.matrix_norm(padding, 2)) ** 2)


def test_one_tap_is_left_as_it_is():
    weight = torch.rand(2, 3, 5)
    assert Taps.of(Axis(8, 5, before=2, after=2)).merged(weight, 2) is weight
