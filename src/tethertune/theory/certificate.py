"""Bounds that are proven, for chains of layers: ``f_j = phi(W_j f_{j-1})`` and logits ``V f_L``.

They bound the Rademacher complexity R of the class of section 1.1; with probability at least ``1 - delta`` over the
training sample, for every network of a class that was fixed before the sample was seen,

    expected loss <= mean training loss + 2 R + confidence(samples, delta, loss_range).

``docs/theory.md`` has the proofs. Whole networks with residual connections, pooling and batch norm: ``certify``.
"""

import math
from collections.abc import Sequence

from tethertune.errors import ConfigurationError
from tethertune.theory import calculus
from tethertune.theory.bounds import Bound, Layer, log, log_sum, positive, to_log10
from tethertune.theory.calculus import Tail

__all__ = [
    "chain",
    "confidence",
    "distance",
    "frobenius_product",
    "head_complexity",
    "output_shift",
    "perturbation",
    "product",
]


def product(
    layers: Sequence[Layer],
    *,
    head_bound: float,
    samples: int,
    classes: int,
    input_dim: int,
    input_bound: float,
    lipschitz: float,
) -> Bound:
    r"""The product bound, for MARS norms: no ``2^L``, and no distances.

    .. math:: 2 c \rho C_\infty B_V \prod_j B_j \sqrt{L \log 2 + \log 2d} \Big/ \sqrt m

    Needs activations that are 1-Lipschitz and 0 at 0, and no biases.

    Args:
        layers: MARS norm bound of each body layer; its ``distance`` is not used here.
        head_bound: B_V, the MARS norm bound of the head.
        samples: m, the number of training examples.
        classes: c, the number of classes.
        input_dim: d, the number of entries of one input.
        input_bound: The largest absolute value of an input's entries.
        lipschitz: rho, the Lipschitz constant of the loss in the l2 norm of the logits.

    Raises:
        ConfigurationError: A number that is not positive.
    """
    positive(input_dim=input_dim, input_bound=input_bound)
    tail = Tail(
        math.log(input_bound) + 0.5 * math.log(samples) + math.fsum(log(layer.bound) for layer in layers),
        math.log(2 * input_dim) + len(layers) * math.log(2),
    ).scaled(0.0)
    value = head_complexity(tail.log_expectation, head_bound, samples, classes, lipschitz)
    return Bound("product bound", to_log10(value), "certificate", is_upper_bound=True)


def distance(
    layers: Sequence[Layer],
    *,
    head_bound: float,
    samples: int,
    classes: int,
    dims: Sequence[int],
    alphas: Sequence[float],
    lipschitz: float,
) -> Bound:
    r"""The distance bound: a term for the frozen features, and one that is 0 where nothing moves.

    .. math:: \frac{\sqrt 2 \rho c B_V}{m} \Big(A_L \sqrt{2 \log 2 d_L} + v_L \sqrt{2 a_L}\Big)

    with ``v_j = B_j v_{j-1} + D_j A_{j-1}``. Any elementwise 1-Lipschitz activations, any biases that do not move.

    Args:
        layers: MARS norm bound ``mars(W0_j) + D_j`` and MARS distance ``D_j`` of each body layer.
        head_bound: B_V, the MARS norm bound of the head.
        samples: m, the number of training examples.
        classes: c, the number of classes.
        dims: d_0..d_L, the number of entries of the input and of each layer's output.
        alphas: A_j / sqrt(m) for j = 0..L: the largest root mean square, over the training sample, of an entry of the
            reference network's features.
        lipschitz: rho, the Lipschitz constant of the loss in the l2 norm of the logits.

    Returns:
        The bound; its ``parts`` are ``frozen`` and ``moved``.

    Raises:
        ConfigurationError: A number that is not positive, or lists that do not fit each other.
    """
    if len(dims) != len(layers) + 1 or len(alphas) != len(layers) + 1:
        raise ConfigurationError(
            f"{len(dims)} dims and {len(alphas)} alphas given for {len(layers)} layers: both need one more than layers,"
            " for the input and each layer's output."
        )
    tail = chain(layers, dims=dims, alphas=alphas, samples=samples)[-1]
    features = calculus.sub_gaussian(log(alphas[-1]) + 0.5 * math.log(samples), dims[-1])
    frozen = head_complexity(features.log_expectation, head_bound, samples, classes, lipschitz)
    moved = head_complexity(tail.log_expectation, head_bound, samples, classes, lipschitz)
    return Bound(
        "distance bound",
        to_log10(log_sum((frozen, moved))),
        "certificate",
        is_upper_bound=True,
        parts=(("frozen", to_log10(frozen)), ("moved", to_log10(moved))),
    )


def chain(layers: Sequence[Layer], *, dims: Sequence[int], alphas: Sequence[float], samples: int) -> list[Tail]:
    """The pair (v, a) of what has moved, after each linear map and each activation of a chain."""
    positive(samples=samples)
    tails, tail = [], calculus.ZERO
    for layer, into, out, alpha in zip(layers, dims, dims[1:], alphas, strict=False):
        source = calculus.sub_gaussian(log(layer.distance) + log(alpha) + 0.5 * math.log(samples), into)
        tail = calculus.mix((tail.scaled(log(layer.bound)), source))
        tails.append(tail)
        tail = calculus.elementwise(tail, 1.0, math.log(2 * out))
        tails.append(tail)
    return tails or [calculus.ZERO]


def frobenius_product(
    layers: Sequence[Layer],
    *,
    head_bound: float,
    samples: int,
    classes: int,
    input_bound: float,
    lipschitz: float,
) -> Bound:
    r"""The product bound for Frobenius norms of the unrolled operators: ReLU and leaky ReLU chains.

    .. math:: \sqrt{2c} \rho C_2 B_V \prod_j B_j \min\big(2^{L/2}, \sqrt2 (1 + \sqrt{2 L \log 2})\big) \Big/ \sqrt m

    Args:
        layers: Frobenius norm bound of each body layer's operator; its ``distance`` is not used here.
        head_bound: B_V, the Frobenius norm bound of the head.
        samples: m, the number of training examples.
        classes: c, the number of classes.
        input_bound: The largest l2 norm of an input.
        lipschitz: rho, the Lipschitz constant of the loss in the l2 norm of the logits.

    Raises:
        ConfigurationError: A number that is not positive.
    """
    positive(head_bound=head_bound, samples=samples, classes=classes, input_bound=input_bound, lipschitz=lipschitz)
    depth = len(layers)
    peeling = min(0.5 * depth * math.log(2), math.log(math.sqrt(2) * (1 + math.sqrt(2 * depth * math.log(2)))))
    value = (
        0.5 * math.log(2 * classes)
        + math.log(lipschitz)
        + math.log(input_bound)
        + math.log(head_bound)
        + math.fsum(log(layer.bound) for layer in layers)
        + peeling
        - 0.5 * math.log(samples)
    )
    return Bound("Frobenius product bound", to_log10(value), "certificate", is_upper_bound=True)


def perturbation(
    layers: Sequence[Layer],
    *,
    head_bound: float,
    samples: int,
    classes: int,
    features_dim: int,
    features_alpha: float,
    input_bound: float,
    lipschitz: float,
    sup_lipschitz: float,
) -> Bound:
    """The perturbation bound: the frozen features' complexity plus the most that the outputs can have moved.

    Beats the distance bound for small samples. It is its own event: with the other bounds, give each ``delta / 2``.

    Args:
        layers: ``mars(W0_j) + D_j`` and ``D_j`` of each body layer; plain chain, activations 0 at 0, no biases.
        head_bound: B_V, the MARS norm bound of the head.
        samples: m, the number of training examples.
        classes: c, the number of classes.
        features_dim: d_L, the number of entries of the features that the head sees.
        features_alpha: A_L / sqrt(m), see :func:`distance`.
        input_bound: Bound, known before the data, of the absolute value of an input's entries.
        lipschitz: rho, the Lipschitz constant of the loss in the l2 norm of the logits.
        sup_lipschitz: The Lipschitz constant of the loss in the sup norm of the logits.

    Returns:
        The bound, as a complexity: the gap is twice it, plus the confidence term. ``parts``: ``frozen``, ``moved``.
    """
    positive(sup_lipschitz=sup_lipschitz)
    frozen = head_complexity(
        calculus.sub_gaussian(log(features_alpha) + 0.5 * math.log(samples), features_dim).log_expectation,
        head_bound,
        samples,
        classes,
        lipschitz,
    )
    moved = math.log(sup_lipschitz) + math.log(head_bound) + output_shift(layers, input_bound=input_bound)
    return Bound(
        "perturbation bound",
        to_log10(log_sum((frozen, moved))),
        "certificate",
        is_upper_bound=True,
        parts=(("frozen", to_log10(frozen)), ("moved", to_log10(moved))),
    )


def output_shift(layers: Sequence[Layer], *, input_bound: float) -> float:
    """``log`` of e_L, the most that a feature can move: ``C (prod B_j - prod (B_j - D_j))``, without cancellation.

    Raises:
        ConfigurationError: A distance above its bound, which cannot be ``mars(W0) + D``.
    """
    positive(input_bound=input_bound)
    for layer in layers:
        if layer.distance > layer.bound:
            raise ConfigurationError(
                f"distance {layer.distance} above bound {layer.bound}: the bound must be mars(W0) + distance."
            )
    if any(layer.bound == 0 for layer in layers) or not any(layer.distance for layer in layers):
        return -math.inf
    kept = math.fsum(
        math.log1p(-layer.distance / layer.bound) if layer.distance < layer.bound else -math.inf for layer in layers
    )
    return math.log(input_bound) + math.fsum(math.log(layer.bound) for layer in layers) + math.log(-math.expm1(kept))


def head_complexity(log_features: float, head_bound: float, samples: int, classes: int, lipschitz: float) -> float:
    """``log`` of ``sqrt(2) rho c B_V / m`` times the expected sup norm of the features' sum (Lemma 1)."""
    positive(head_bound=head_bound, samples=samples, classes=classes, lipschitz=lipschitz)
    return (
        0.5 * math.log(2)
        + math.log(lipschitz)
        + math.log(classes)
        + math.log(head_bound)
        - math.log(samples)
        + log_features
    )


def confidence(samples: int, delta: float, loss_range: float = 1.0, *, price: float = 0.0) -> float:
    r"""The confidence term of a sample-dependent bound, :math:`3 b \sqrt{(\log (2/\delta) + p) / 2m}`.

    Args:
        samples: m, the number of training examples.
        delta: The probability, at most, that the certificate fails.
        loss_range: b, the largest value of the loss.
        price: Nats paid for having chosen the class on the sample: ``sum log(1 / weight)`` over the grid cells used.

    Raises:
        ConfigurationError: ``delta`` outside (0, 1), or a number that is not positive.

    Example:
        >>> round(confidence(100, 0.05), 6)
        0.40743
    """
    positive(samples=samples, loss_range=loss_range)
    if not 0 < delta < 1:
        raise ConfigurationError(f"delta={delta}: it must be between 0 and 1, such as 0.05.")
    return 3 * loss_range * math.sqrt((math.log(2 / delta) + price) / (2 * samples))
