"""Rows as stretches of memory, compared with the address of every element."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tethertune.kernels.stretches import as_stretches

torch.set_num_threads(1)

ONES = torch.ones(6, dtype=torch.float64)


def take(W, centre, by_row=True, radius=ONES, size=math.inf):
    return as_stretches(W, centre, radius[: len(W)], size=size, by_row=by_row)


def addresses(tensor):
    """Where the elements of each row lie, in elements from the first."""
    return torch.arange(1000).as_strided(tensor.shape, tensor.stride()).reshape(len(tensor), -1).tolist()


def fill_a_stretch(places):
    return sorted(places) == list(range(min(places), min(places) + len(places)))


def order(tensor):
    """The steps along a row, those of axes of one entry aside."""
    return [step for step, size in zip(tensor.stride()[1:], tensor.shape[1:], strict=True) if size > 1]


def pairs(weights, centres):
    return sorted(zip(weights.flatten().tolist(), centres.flatten().tolist(), strict=True))


@st.composite
def weights_and_centres(draw):
    """Of one shape, each with its axes in some order in memory, some with gaps."""
    shape = [draw(st.integers(1, 6)), *draw(st.lists(st.integers(1, 3), max_size=3))]

    def laid_out(order):
        stored = [shape[axis] for axis in order]
        wider = [size + draw(st.sampled_from([0, 0, 0, 1])) for size in stored]
        padded = torch.arange(1.0, 1 + math.prod(wider)).view(wider)
        return padded[tuple(map(slice, stored))].permute([order.index(axis) for axis in range(len(shape))])

    usual = list(range(len(shape)))
    order = [0, *draw(st.permutations(usual[1:]))] if draw(st.booleans()) else draw(st.permutations(usual))
    return laid_out(order), laid_out(draw(st.sampled_from([order, order, usual])))


@given(weights_and_centres(), st.booleans())
@settings(max_examples=400, deadline=None)
def test_what_is_taken_are_the_weights_themselves_each_beside_its_own_centre(case, by_row):
    W, centre = case
    found = take(W, centre, by_row)
    gapless = all(map(fill_a_stretch, addresses(W)))
    if found is None:
        assert not gapless or order(W) != order(centre)
        return
    assert gapless
    as_one = not by_row and all(fill_a_stretch([place for row in addresses(T) for place in row]) for T in case)
    assert len(found.weight) == (1 if as_one else len(W))
    expected = [pairs(W, centre)] if as_one else [pairs(w, c) for w, c in zip(W, centre, strict=True)]
    assert found.weight.stride(1) == found.centre.stride(1) == 1
    assert [pairs(w, c) for w, c in zip(found.weight, found.centre, strict=True)] == expected
    found.weight.zero_()
    assert not W.any()


def test_stretches_are_rows_without_gaps_in_one_order():
    W = torch.randn(6, 4, 3, 3)
    last = W.contiguous(memory_format=torch.channels_last)
    assert take(W, W).weight.shape == (6, 36)
    assert take(W, W, by_row=False).weight.shape == (1, 216)
    assert take(last, last).weight.data_ptr() == last.data_ptr()
    assert take(W, torch.zeros(()).expand(W.shape)).centre is None
    assert take(W[::2], W[:3]).weight.stride() == (72, 1)
    assert take(W[::2], W[:3], by_row=False).weight.shape == (3, 36)
    assert take(W, last) is None
    point = W[:, :, :1, :1].contiguous()  # a kernel of one entry is in both orders
    assert take(point, point.contiguous(memory_format=torch.channels_last)).weight.shape == (6, 4)
    assert take(W, torch.ones(()).expand(W.shape)) is None
    assert take(W.transpose(0, 1), W.transpose(0, 1)) is None
    assert take(W[:, :2, :, :1], W[:, :2, :, :1]) is None


def test_a_centre_that_is_one_row_for_all_is_read_again_for_each():
    W, row = torch.randn(5, 4), torch.randn(4)
    found = take(W, row.expand(5, 4))
    assert torch.equal(found.centre, torch.stack([row] * 5))
    assert found.centre.stride() == (0, 1)
    assert take(W, row.expand(5, 4), by_row=False).weight.shape == (5, 4)


@pytest.mark.parametrize(("by_row", "count"), [(True, 3), (False, 1)])
def test_the_radius_stays_the_tensor_that_is_given_so_that_a_change_in_place_counts(by_row, count):
    radius = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    found = take(torch.randn(3, 2), torch.randn(3, 2), by_row, radius, size=7.0)
    radius.mul_(2)
    assert found.radius.tolist() == [2.0, 4.0, 6.0][:count]
    assert found.radius.is_contiguous()
    assert found.size == 7.0


def test_radii_with_gaps_are_copied_together():
    found = take(torch.randn(3, 2), torch.randn(3, 2), radius=torch.arange(6, dtype=torch.float64)[::2])
    assert found.radius.tolist() == [0.0, 2.0, 4.0]
    assert found.radius.is_contiguous()
