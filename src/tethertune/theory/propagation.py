"""Bounds carried through a traced network, node by node.

One walk, three readings of the nodes: what fine-tuning changed of the features (the distance bound), the features
themselves (the product bound), and the most that a feature can move (the perturbation bound).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from tethertune.theory import calculus
from tethertune.theory.bounds import log, log_sum
from tethertune.theory.calculus import Tail
from tethertune.theory.nodes import Concat, Elementwise, Fixed, Input, Linear, MaxPool, Network, Node, Shift, Sum

__all__ = ["Ball", "Distance", "Perturbation", "Product", "walk"]


@dataclass(frozen=True)
class Ball:
    """The class that one linear map's folded weight and bias come from.

    Attributes:
        reference: MARS norm of the reference map.
        distance: D_j, the MARS distance allowed.
        shift: beta_j, how far the bias may move, in the sup norm.
        bias: The largest absolute value of the reference's bias.
    """

    reference: float
    distance: float
    shift: float = 0.0
    bias: float = 0.0

    @property
    def bound(self) -> float:
        """B_j = mars(W0_j) + D_j."""
        return self.reference + self.distance


Value = TypeVar("Value")


class Reading(Protocol[Value]):
    """What each kind of node does to a value."""

    def input(self, node: Input) -> Value: ...
    def linear(self, index: int, node: Linear, value: Value) -> Value: ...
    def elementwise(self, node: Elementwise, value: Value) -> Value: ...
    def fixed(self, node: Fixed, value: Value) -> Value: ...
    def shift(self, node: Shift, value: Value) -> Value: ...
    def sum(self, node: Sum, values: Sequence[Value]) -> Value: ...
    def concat(self, node: Concat, values: Sequence[Value]) -> Value: ...
    def max_pool(self, node: MaxPool, value: Value) -> Value: ...


def walk(network: Network, reading: Reading[Value]) -> Value:
    """The value at the features that the head is applied to."""
    values: list[Value] = []
    for index, node in enumerate(network.nodes[: network.features + 1]):
        values.append(_read(index, node, reading, [values[i] for i in node.inputs]))
    return values[network.features]


def _read(index: int, node: Node, reading: Reading[Value], inputs: list[Value]) -> Value:
    match node:
        case Input():
            return reading.input(node)
        case Linear():
            return reading.linear(index, node, *inputs)
        case Elementwise():
            return reading.elementwise(node, *inputs)
        case Fixed():
            return reading.fixed(node, *inputs)
        case Shift():
            return reading.shift(node, *inputs)
        case Sum():
            return reading.sum(node, inputs)
        case Concat():
            return reading.concat(node, inputs)
        case MaxPool():
            return reading.max_pool(node, *inputs)
        case _:
            raise AssertionError(node)


@dataclass(frozen=True)
class Distance:
    """The pair (v, a) of ``f - f0``, from the frozen features' sizes.

    Attributes:
        balls: The class of each linear map, by position.
        log_features: ``log A_in`` of each linear map: the largest root sum of squares, over the sample, of an entry of
            what the reference network feeds it.
        samples: m.
    """

    balls: Mapping[int, Ball]
    log_features: Mapping[int, float]
    samples: int

    def input(self, node: Input) -> Tail:  # noqa: D102, ARG002
        return calculus.ZERO

    def linear(self, index: int, node: Linear, value: Tail) -> Tail:  # noqa: D102
        ball = self.balls[index]
        moved = calculus.sub_gaussian(log(ball.distance) + self.log_features[index], node.fan_in)
        bias = calculus.sub_gaussian(log(ball.shift) + 0.5 * math.log(self.samples), 1)
        return calculus.mix((value.scaled(log(ball.bound)), moved, bias))

    def elementwise(self, node: Elementwise, value: Tail) -> Tail:  # noqa: D102
        return calculus.elementwise(value, node.lipschitz, math.log(2 * node.size))

    def fixed(self, node: Fixed, value: Tail) -> Tail:  # noqa: D102
        return value.scaled(log(node.factor))

    def shift(self, node: Shift, value: Tail) -> Tail:  # noqa: D102, ARG002
        return value

    def sum(self, node: Sum, values: Sequence[Tail]) -> Tail:  # noqa: D102
        return calculus.mix(value.scaled(log(factor)) for value, factor in zip(values, node.factors, strict=True))

    def concat(self, node: Concat, values: Sequence[Tail]) -> Tail:  # noqa: D102, ARG002
        return calculus.concat(values)

    def max_pool(self, node: MaxPool, value: Tail) -> Tail:  # noqa: D102
        return calculus.max_pool(value, node.window, math.log(2 * node.size))


@dataclass(frozen=True)
class Product:
    """The pair (v, a) of the features themselves.

    Attributes:
        balls: The class of each linear map, by position.
        log_input: ``log A_0`` of the inputs.
        samples: m.
    """

    balls: Mapping[int, Ball]
    log_input: float
    samples: int

    def _constant(self, value: float) -> Tail:
        return calculus.sub_gaussian(log(value) + 0.5 * math.log(self.samples), 1)

    def input(self, node: Input) -> Tail:  # noqa: D102
        return calculus.sub_gaussian(self.log_input, node.size)

    def linear(self, index: int, node: Linear, value: Tail) -> Tail:  # noqa: D102, ARG002
        ball = self.balls[index]
        return calculus.mix((value.scaled(log(ball.bound)), self._constant(ball.bias + ball.shift)))

    def elementwise(self, node: Elementwise, value: Tail) -> Tail:  # noqa: D102
        moved = calculus.elementwise(value, node.lipschitz, math.log(2))
        return calculus.mix((moved, self._constant(abs(node.at_zero))))

    def fixed(self, node: Fixed, value: Tail) -> Tail:  # noqa: D102
        return value.scaled(log(node.factor))

    def shift(self, node: Shift, value: Tail) -> Tail:  # noqa: D102
        return calculus.mix((value, self._constant(node.constant)))

    def sum(self, node: Sum, values: Sequence[Tail]) -> Tail:  # noqa: D102
        return calculus.mix(value.scaled(log(factor)) for value, factor in zip(values, node.factors, strict=True))

    def concat(self, node: Concat, values: Sequence[Tail]) -> Tail:  # noqa: D102, ARG002
        return calculus.concat(values)

    def max_pool(self, node: MaxPool, value: Tail) -> Tail:  # noqa: D102
        return calculus.max_pool(value, node.window, math.log(2))


@dataclass(frozen=True)
class Moved:
    """Logarithms of the most that an entry can move, and of its largest absolute value in the reference network."""

    log_shift: float
    log_size: float


@dataclass(frozen=True)
class Perturbation:
    """How far an entry can move, for every input within the bound: ``e_j = B_j e + D_j F + beta_j``.

    Attributes:
        balls: The class of each linear map, by position.
        input_bound: The largest absolute value of an input's entries, known before the data.
    """

    balls: Mapping[int, Ball]
    input_bound: float

    def input(self, node: Input) -> Moved:  # noqa: D102, ARG002
        return Moved(-math.inf, log(self.input_bound))

    def linear(self, index: int, node: Linear, value: Moved) -> Moved:  # noqa: D102, ARG002
        ball = self.balls[index]
        return Moved(
            log_sum((log(ball.bound) + value.log_shift, log(ball.distance) + value.log_size, log(ball.shift))),
            log_sum((log(ball.reference) + value.log_size, log(ball.bias))),
        )

    def elementwise(self, node: Elementwise, value: Moved) -> Moved:  # noqa: D102
        size = log_sum((log(node.lipschitz) + value.log_size, log(abs(node.at_zero))))
        ceiling = log(node.ceiling)
        return Moved(
            min(log(node.lipschitz) + value.log_shift, math.log(2) + ceiling),
            min(size, ceiling),
        )

    def fixed(self, node: Fixed, value: Moved) -> Moved:  # noqa: D102
        return Moved(value.log_shift + log(node.factor), value.log_size + log(node.factor))

    def shift(self, node: Shift, value: Moved) -> Moved:  # noqa: D102
        return Moved(value.log_shift, log_sum((value.log_size, log(node.constant))))

    def sum(self, node: Sum, values: Sequence[Moved]) -> Moved:  # noqa: D102
        factors = [log(factor) for factor in node.factors]
        pairs = list(zip(values, factors, strict=True))
        return Moved(
            log_sum(value.log_shift + factor for value, factor in pairs),
            log_sum(value.log_size + factor for value, factor in pairs),
        )

    def concat(self, node: Concat, values: Sequence[Moved]) -> Moved:  # noqa: D102, ARG002
        return Moved(max(value.log_shift for value in values), max(value.log_size for value in values))

    def max_pool(self, node: MaxPool, value: Moved) -> Moved:  # noqa: D102, ARG002
        return value
