"""Each rule of the table in docs/theory.md, on networks put together by hand."""

import math

import pytest
import torch

from tethertune.theory import calculus
from tethertune.theory.maps import Dense
from tethertune.theory.nodes import Concat, Elementwise, Fixed, Input, Linear, MaxPool, Network, Shift, Sum
from tethertune.theory.propagation import Ball, Distance, Moved, Perturbation, Product, walk

torch.set_num_threads(1)
M = 100
BALLS = {1: Ball(reference=1.5, distance=0.5, shift=0.1, bias=0.7), 2: Ball(reference=3.0, distance=0.0)}
LOG_FEATURES = {1: math.log(5.0), 2: math.log(7.0)}


def linear(position, source, size=4, fan_in=3):
    return Linear(f"layer{position}", (source,), size, Dense(), "weight", None, None, f"call{position}", fan_in)


def network(*nodes):
    """Two maps of one input, then the nodes given; the last is what the head sees."""
    all_nodes = (Input("input", (), 3), linear(1, 0), linear(2, 0), *nodes)
    head = linear(len(all_nodes), len(all_nodes) - 1)
    return Network(all_nodes, head, len(all_nodes) - 1, 2, None, (), {})


def readings(*nodes):
    """The pair of the distance bound, that of the product bound, and the perturbation, of the last node."""
    net = network(*nodes)
    distance = walk(net, Distance(BALLS, LOG_FEATURES, M))
    product = walk(net, Product(BALLS, math.log(20.0), M))
    return distance, product, walk(net, Perturbation(BALLS, 2.0))


def pair(v, a):
    return pytest.approx((v, a), rel=1e-12)


def plain(tail):
    return tail.v, tail.a


MOVED = (0.5 * 5 + 0.1 * 10, (0.5 * 5 * math.log(6) + 0.1 * 10 * math.log(2)) / 3.5)
"""Of layer 1: ``D A_in`` and ``beta sqrt(m)``."""
FEATURES = (2 * 20 + 0.8 * 10, (2 * 20 * math.log(6) + 0.8 * 10 * math.log(2)) / 48)
"""``B A_0`` and ``(|b0| + beta) sqrt(m)``."""
STILL = (3 * 20, math.log(6))
"""Of layer 2, which does not move."""
SHIFT, SIZE = 0.5 * 2 + 0.1, 1.5 * 2 + 0.7
OTHER_SIZE = 6.0


def test_a_linear_map():
    distance, product, moved = readings(Fixed("same", (1,), 4, 1.0))
    assert plain(distance) == pair(*MOVED)
    assert plain(product) == pair(*FEATURES)
    assert (math.exp(moved.log_shift), math.exp(moved.log_size)) == pair(SHIFT, SIZE)


def test_a_linear_map_that_does_not_move():
    distance, product, moved = readings(Fixed("same", (2,), 4, 1.0))
    assert distance == calculus.ZERO
    assert plain(product) == pair(*STILL)
    assert moved.log_shift == -math.inf


def test_an_activation():
    distance, product, moved = readings(Elementwise("act", (1,), 4, 1.1, -0.5, math.inf))
    v, a = MOVED
    assert plain(distance) == pair(1.1 * v, a + math.log(8))
    v, a = FEATURES
    expected = 1.1 * v + 0.5 * 10
    assert plain(product) == pair(expected, (1.1 * v * (a + math.log(2)) + 5 * math.log(2)) / expected)
    assert (math.exp(moved.log_shift), math.exp(moved.log_size)) == pair(1.1 * SHIFT, 1.1 * SIZE + 0.5)


def test_an_activation_with_a_ceiling_moves_no_further_than_between_its_ends():
    moved = readings(Elementwise("act", (1,), 4, 1.0, 0.0, 0.25))[2]
    assert (math.exp(moved.log_shift), math.exp(moved.log_size)) == pair(0.5, 0.25)


def test_a_fixed_map_and_a_shift():
    distance, product, moved = readings(Fixed("pool", (1,), 4, 0.3), Shift("plus", (3,), 4, 2.0))
    assert plain(distance) == pair(0.3 * MOVED[0], MOVED[1])
    v = 0.3 * FEATURES[0]
    assert plain(product) == pair(v + 20, (v * FEATURES[1] + 20 * math.log(2)) / (v + 20))
    assert (math.exp(moved.log_shift), math.exp(moved.log_size)) == pair(0.3 * SHIFT, 0.3 * SIZE + 2)


def test_a_residual_sum():
    distance, product, moved = readings(Sum("add", (1, 2), 4, (1.0, 0.5)))
    assert plain(distance) == pair(*MOVED)
    v = FEATURES[0] + 0.5 * STILL[0]
    assert plain(product) == pair(v, (FEATURES[0] * FEATURES[1] + 0.5 * STILL[0] * STILL[1]) / v)
    assert (math.exp(moved.log_shift), math.exp(moved.log_size)) == pair(SHIFT, SIZE + 0.5 * OTHER_SIZE)


def test_a_node_that_is_added_to_itself_is_twice_as_large():
    distance, _, moved = readings(Sum("add", (1, 1), 4, (1.0, 1.0)))
    assert plain(distance) == pair(2 * MOVED[0], MOVED[1])
    assert math.exp(moved.log_shift) == pytest.approx(2 * SHIFT)


def test_a_concatenation():
    distance, product, moved = readings(Concat("cat", (1, 2), 8))
    assert plain(distance) == pair(*MOVED)  # a branch that does not vary adds nothing to the union
    assert plain(product) == pair(max(FEATURES[0], STILL[0]), max(FEATURES[1], STILL[1]) + math.log(2))
    assert (math.exp(moved.log_shift), math.exp(moved.log_size)) == pair(SHIFT, max(SIZE, OTHER_SIZE))


@pytest.mark.parametrize(("window", "levels"), [(1, 0), (2, 1), (4, 2), (9, 4)])
def test_max_pooling(window, levels):
    distance, product, moved = readings(MaxPool("pool", (1,), 2, window))
    assert plain(distance) == pair(window * MOVED[0], MOVED[1] + 0.5 * levels * math.log(4))
    assert plain(product) == pair(window * FEATURES[0], FEATURES[1] + 0.5 * levels * math.log(2))
    assert moved == readings(Fixed("same", (1,), 4, 1.0))[2]


def test_what_a_ball_bounds():
    assert BALLS[1].bound == 2.0
    assert Moved(0.0, 0.0).log_shift == 0.0
