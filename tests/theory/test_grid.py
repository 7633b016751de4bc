import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tethertune.errors import ConfigurationError
from tethertune.theory import grid


def test_worked_numbers():
    cell = grid.cover(0.37, 2.0)
    assert cell.index == -17
    assert (cell.radius, cell.weight) == pytest.approx((0.39568933780027, 0.00194931773879), rel=1e-9)
    cell = grid.cover(3.0, 2.0)
    assert cell.index == 5
    assert (cell.radius, cell.weight) == pytest.approx((3.22102, 1 / 63), rel=1e-12)
    assert cell.price == pytest.approx(math.log(63), rel=1e-12)


def test_the_weights_sum_to_one():
    assert math.fsum(grid.weight(k) for k in range(-20000, 20001)) == pytest.approx(1, abs=1e-4)


@given(st.floats(1e-5, 1e5), st.floats(1e-3, 1e3))
def test_the_cell_holds_the_value_and_is_the_smallest(value, scale):
    cell = grid.cover(value, scale)
    assert cell.radius >= value
    assert cell.radius <= max(value, grid.SMALLEST * scale) * grid.RATIO * (1 + 1e-9)


@given(st.integers(-100, 100))
def test_a_radius_of_the_grid_is_its_own_cell(index):
    assert grid.cover(2.0 * 1.1**index, 2.0).index == index


@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(1e-2, 1e2)), min_size=1, max_size=5))
def test_one_index_for_all(pairs):
    values, scales = zip(*pairs, strict=True)
    cells = grid.cover_together(values, scales)
    assert len({cell.index for cell in cells}) == 1
    assert all(cell.radius >= value for cell, value in zip(cells, values, strict=True))


def test_zero_is_the_smallest_cell():
    assert grid.cover(0.0, 1.0).radius == pytest.approx(grid.SMALLEST, rel=0.11)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [((math.inf, 1.0), "must be finite"), ((1.0, 0.0), "scales"), ((-1.0, 1.0), "0 or more")],
)
def test_refusals(arguments, says):
    with pytest.raises(ConfigurationError, match=says):
        grid.cover(*arguments)
    with pytest.raises(ConfigurationError, match="above 1"):
        grid.cover(1.0, ratio=0.5)
