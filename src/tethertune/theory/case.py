"""A network and its sample: the bounds of any class of networks around the reference, proven ones and printed ones."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from tethertune.theory import calculus, printed
from tethertune.theory.bounds import Bound, Layer, log, log_sum, to_log10
from tethertune.theory.classes import NetworkClass
from tethertune.theory.losses import Loss
from tethertune.theory.maps import OperatorNorms
from tethertune.theory.nodes import Network
from tethertune.theory.propagation import Ball, Distance, Perturbation, Product, walk
from tethertune.theory.sample import Sample

__all__ = ["Bounds", "Case", "Sizes", "as_printed", "sizes"]


@dataclass(frozen=True)
class Bounds:
    """What is proven of one class of networks, for one loss.

    Attributes:
        choice: The class.
        loss: The loss.
        product: The product bound.
        distance: The distance bound, with its frozen and moved parts.
        perturbation: The perturbation bound, where a bound of the inputs was declared.
    """

    choice: NetworkClass
    loss: Loss
    product: Bound
    distance: Bound
    perturbation: Bound | None

    @property
    def all(self) -> list[Bound]:
        """Those that there are."""
        return [bound for bound in (self.product, self.distance, self.perturbation) if bound is not None]

    @property
    def complexity(self) -> Bound:
        """The smaller of the product and the distance bound."""
        return min(self.product, self.distance, key=lambda bound: bound.log10)

    def as_measured(self) -> "Bounds":
        """The same numbers for a class that was read off the network, of which nothing is proven."""

        def relabel(bound: Bound) -> Bound:
            return replace(bound, kind="measurement", is_upper_bound=None)

        furthest = None if self.perturbation is None else relabel(self.perturbation)
        return replace(self, product=relabel(self.product), distance=relabel(self.distance), perturbation=furthest)


@dataclass(frozen=True)
class Case:
    """A network and its sample: everything that does not depend on the class.

    Attributes:
        network: The traced network.
        sample: What was seen of the training sample.
        input_bound: A bound, known before the data, of the absolute value of every entry of every input.
        delta: The probability that the drawn signs for the frozen features may fail with; ``None``: draw none.
    """

    network: Network
    sample: Sample
    input_bound: float | None = None
    delta: float | None = None

    def moved(self, balls: Mapping[int, Ball]) -> calculus.Tail:
        """The pair (v, a) of what has moved of the features."""
        log_features = {index: self.sample.log_features[node.call] for index, node in self.network.linears.items()}
        return walk(self.network, Distance(balls, log_features, self.sample.size))

    def product(self, balls: Mapping[int, Ball]) -> calculus.Tail:
        """The pair (v, a) of the features."""
        return walk(self.network, Product(balls, self.sample.log_input, self.sample.size))

    def head(self, tail: calculus.Tail, choice: NetworkClass, loss: Loss) -> float:
        """``log`` of the complexity that the head makes of features with a pair (v, a)."""
        classes = self.sample.scores.classes
        return self._scaled(math.log(2 * classes) + tail.log_expectation, choice.head_bound, loss)

    def frozen(self, choice: NetworkClass, loss: Loss) -> float:
        """``log`` of the complexity of the head on the reference's features, and of its bias."""
        weights = self._scaled(self.sample.frozen.log_bound(self.delta), choice.head_bound, loss)
        return log_sum((weights, self.bias(choice, loss)))

    def bias(self, choice: NetworkClass, loss: Loss) -> float:
        """``log`` of the complexity that the head's bias adds: a weight on the constant 1, ``E |sum s| <= sqrt(m)``."""
        sample = self.sample
        constant = sample.scores.classes * math.sqrt(sample.size) + sample.root_counts
        return self._scaled(math.log(constant), choice.head_bias, loss)

    def _scaled(self, log_sums: float, bound: float, loss: Loss) -> float:
        return log(loss.slope) + log(bound) + log_sums - math.log(self.sample.size)

    def distance(self, balls: Mapping[int, Ball], choice: NetworkClass, loss: Loss) -> float:
        """``log`` of the distance bound, frozen part and bias included."""
        return log_sum((self.frozen(choice, loss), self.head(self.moved(balls), choice, loss)))

    def bounds(self, choice: NetworkClass, loss: Loss) -> Bounds:
        """All bounds of one class and one loss."""
        frozen = self.frozen(choice, loss)
        moved = self.head(self.moved(choice.balls), choice, loss)
        product = log_sum((self.head(self.product(choice.balls), choice, loss), self.bias(choice, loss)))
        perturbation = None
        if self.input_bound is not None:
            most = walk(self.network, Perturbation(choice.balls, self.input_bound))
            shift = log(loss.sup_lipschitz) + log(choice.head_bound) + most.log_shift
            perturbation = _sum("perturbation bound", frozen, shift)
        return Bounds(
            choice,
            loss,
            Bound("product bound", to_log10(product), "certificate", is_upper_bound=True),
            _sum("distance bound", frozen, moved),
            perturbation,
        )


def _sum(name: str, frozen: float, moved: float) -> Bound:
    parts = (("frozen", to_log10(frozen)), ("moved", to_log10(moved)))
    return Bound(name, to_log10(log_sum((frozen, moved))), "certificate", is_upper_bound=True, parts=parts)


@dataclass(frozen=True)
class Sizes:
    """What the printed bounds need to know of a network's linear maps, batch norm folded in.

    Attributes:
        reference: Norms of each map of the body in the reference network.
        moved: Norms of each displacement.
        head_frobenius: Frobenius norm of the head.
        parameters: n, the number of parameters of the folded maps and the head.
    """

    reference: Sequence[OperatorNorms]
    moved: Sequence[OperatorNorms]
    head_frobenius: float
    parameters: int


def sizes(network: Network, state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Sizes:
    """Measure a trained network against its reference, in the norms of all printed bounds."""
    before, moved, parameters = [], [], 0
    for node in network.linears.values():
        weight, bias = node.folded(state)
        weight0, _ = node.folded(reference)
        parameters += weight.numel() + (0 if bias is None else bias.numel())
        displacement = weight - weight0
        del weight  # a large layer's are gigabytes
        before.append(node.geometry.norms(weight0, "fast"))
        moved.append(node.geometry.norms(displacement, "fast"))
    head, bias = network.head.folded(state)
    parameters += head.numel() + (0 if bias is None else bias.numel())
    return Sizes(before, moved, float(head.norm()), parameters)


def as_printed(case: Case, proven: Bounds, found: Sizes) -> tuple[Bound, Bound, Bound, Bound]:
    """Theorems 2 and 3 and Equations 6 and 7 as printed, of a network that is taken for a chain without biases.

    Theorem 2 is of the class of the proven bounds, whose upper bound it is where it is above one of them; the others
    are of balls in their own norms.

    Args:
        case: The network and its sample.
        proven: The bounds of the class, whose MARS radii Theorem 2 takes.
        found: Norms of the maps and of their displacements.
    """
    sample, choice = case.sample, proven.choice
    chain = {"samples": sample.size, "classes": sample.scores.classes, "lipschitz": proven.loss.lipschitz}
    theorem2 = printed.theorem2(
        [Layer(ball.bound, ball.distance) for ball in choice.balls.values()],
        head_bound=choice.head_bound or 1e-300,
        input_dim=case.network.nodes[0].size,
        input_bound=case.input_bound or sample.input_sup,
        **chain,  # type: ignore[arg-type]
    )
    is_bound = theorem2.log10 >= proven.complexity.log10
    pairs = list(zip(found.reference, found.moved, strict=True))
    theorem3 = printed.theorem3(
        [Layer(a.frobenius + d.frobenius, d.frobenius) for a, d in pairs],
        head_bound=found.head_frobenius or 1e-300,
        input_bound=sample.input_norm,
        **chain,  # type: ignore[arg-type]
    )
    spectral = [Layer(a.spectral + d.spectral, d.spectral) for a, d in pairs]
    counted = {"samples": sample.size, "parameters": found.parameters, "lipschitz": proven.loss.lipschitz}
    return (
        replace(theorem2, is_upper_bound=True if is_bound else None),
        replace(theorem3, is_upper_bound=None),
        printed.bartlett(
            spectral,
            two_one_distances=[d.two_one for _, d in pairs],
            input_bound=sample.input_norm,
            **counted,  # type: ignore[arg-type]
        ),
        printed.long_sedghi(spectral, input_bound=sample.input_norm, **counted),  # type: ignore[arg-type]
    )
