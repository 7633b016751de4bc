"""The paper's bounds exactly as they are printed (arXiv 2002.08253v1): not valid bounds, and never certificates.

The proofs of Theorems 2 and 3 drop a term: with every ``D_j = 0`` they say that the complexity is 0, though the head
is still learned. ``certificate`` holds what is proven instead. In deep networks the printed number is usually above a
proven one, because its factor ``2^L`` is so loose; ``is_upper_bound`` is ``True`` exactly where that has been checked
for the numbers given.

Equations 6 and 7 of Appendix C (bounds of others, which the paper compares with) have their constants dropped, and
leave out the head: append ``Layer(B_V, B_V)`` to include it.
"""

import math
from collections.abc import Sequence
from typing import Literal

from tethertune.errors import ConfigurationError
from tethertune.theory import certificate
from tethertune.theory.bounds import Bound, Layer, log, log_sum, positive, to_log10

__all__ = ["bartlett", "long_sedghi", "theorem2", "theorem3"]


def theorem2(
    layers: Sequence[Layer],
    *,
    head_bound: float,
    samples: int,
    classes: int,
    input_dim: int,
    input_bound: float,
    lipschitz: float = 1.0,
) -> Bound:
    r"""Theorem 2 (MARS distances) as printed.

    .. math:: 2 \sqrt{\log 2d}\, c \rho C_\infty B_V \sum_j \frac{D_j}{B_j} \prod_j 2 B_j \Big/ \sqrt m

    Args:
        layers: MARS norm bound and MARS distance of each body layer.
        head_bound: B_V, the MARS norm bound of the head.
        samples: m, the number of training examples.
        classes: c, the number of classes.
        input_dim: d, the number of entries of one input.
        input_bound: The largest absolute value of an input's entries.
        lipschitz: rho, the Lipschitz constant of the loss in the l2 norm of the logits.

    Raises:
        ConfigurationError: A number that is not positive.
    """
    positive(head_bound=head_bound, samples=samples, classes=classes, input_dim=input_dim)
    positive(input_bound=input_bound, lipschitz=lipschitz)
    constant = math.log(2) + 0.5 * math.log(math.log(2 * input_dim)) + math.log(classes)
    scale = math.log(lipschitz) + math.log(input_bound) + math.log(head_bound) - 0.5 * math.log(samples)
    value = constant + scale + len(layers) * math.log(2) + _ratios_times_product(layers)
    proven = certificate.product(
        layers,
        head_bound=head_bound,
        samples=samples,
        classes=classes,
        input_dim=input_dim,
        input_bound=input_bound,
        lipschitz=lipschitz,
    )
    return _printed("Theorem 2 (as printed)", value, proven=proven)


def theorem3(
    layers: Sequence[Layer],
    *,
    head_bound: float,
    samples: int,
    classes: int,
    input_bound: float,
    lipschitz: float = 1.0,
) -> Bound:
    r"""Theorem 3 (Frobenius distances) as printed; the norms are those of the unrolled operators.

    .. math:: \sqrt{2c}\, \rho C_2 B_V \sum_j \frac{D_j}{B_j} \prod_j 2 B_j \Big/ \sqrt m

    Args:
        layers: Frobenius norm bound and distance of each body layer's operator.
        head_bound: B_V, the Frobenius norm bound of the head.
        samples: m, the number of training examples.
        classes: c, the number of classes.
        input_bound: The largest l2 norm of an input.
        lipschitz: rho, the Lipschitz constant of the loss in the l2 norm of the logits.

    Raises:
        ConfigurationError: A number that is not positive.
    """
    positive(head_bound=head_bound, samples=samples, classes=classes, input_bound=input_bound, lipschitz=lipschitz)
    scale = math.log(lipschitz) + math.log(input_bound) + math.log(head_bound) - 0.5 * math.log(samples)
    value = 0.5 * math.log(2 * classes) + scale + len(layers) * math.log(2) + _ratios_times_product(layers)
    proven = certificate.frobenius_product(
        layers,
        head_bound=head_bound,
        samples=samples,
        classes=classes,
        input_bound=input_bound,
        lipschitz=lipschitz,
    )
    return _printed("Theorem 3 (as printed)", value, proven=proven)


def bartlett(
    layers: Sequence[Layer],
    *,
    samples: int,
    parameters: int,
    input_bound: float,
    two_one_distances: Sequence[float],
    lipschitz: float = 1.0,
) -> Bound:
    r"""Equation 6 (Bartlett, Foster and Telgarsky 2017) as the paper prints it: the gap, constants dropped.

    .. math:: \frac{\ln n}{\sqrt m} \rho C_2
       \Big(\sum_j (D^{2,1}_j / B_j)^{2/3}\Big)^{3/2} \prod_j B_j

    Args:
        layers: Spectral norm bound of each layer; its ``distance`` is not used here.
        samples: m, the number of training examples.
        parameters: n, the number of parameters. The original has the largest width in its place.
        input_bound: The largest l2 norm of an input.
        two_one_distances: D^{2,1}_j, the (2,1) distance of each layer.
        lipschitz: rho, the Lipschitz constant of the loss.

    Raises:
        ConfigurationError: A number that is not positive, or another number of distances than of layers.
    """
    positive(samples=samples, parameters=parameters, input_bound=input_bound, lipschitz=lipschitz)
    if len(two_one_distances) != len(layers):
        raise ConfigurationError(f"{len(two_one_distances)} two_one_distances given for {len(layers)} layers.")
    value = log(math.log(parameters)) - 0.5 * math.log(samples) + math.log(lipschitz) + math.log(input_bound)
    return _printed("Eq. 6, Bartlett et al. (as printed)", value + bartlett_sum(layers, two_one_distances), "gap")


def bartlett_sum(layers: Sequence[Layer], two_one_distances: Sequence[float]) -> float:
    r"""``log`` of :math:`\big(\sum_j (D^{2,1}_j / B_j)^{2/3}\big)^{3/2} \prod_j B_j`, also where a B_j is 0."""
    logs = [log(layer.bound) for layer in layers]
    terms = [
        2 / 3 * (log(distance) + math.fsum(logs[:j] + logs[j + 1 :]))
        for j, distance in enumerate(two_one_distances)
        if distance > 0
    ]
    return 1.5 * log_sum(terms)


def long_sedghi(
    layers: Sequence[Layer], *, samples: int, parameters: int, input_bound: float, lipschitz: float = 1.0
) -> Bound:
    r"""Equation 7 (Long and Sedghi 2019) as the paper prints it: the gap, constants dropped.

    .. math:: \sqrt{n / m}\, \rho C_2 \Big(\sum_j D_j\Big) \prod_j B_j

    Args:
        layers: Spectral norm bound and distance of each layer.
        samples: m, the number of training examples.
        parameters: n, the number of parameters.
        input_bound: The largest l2 norm of an input.
        lipschitz: rho, the Lipschitz constant of the loss.

    Raises:
        ConfigurationError: A number that is not positive.
    """
    positive(samples=samples, parameters=parameters, input_bound=input_bound, lipschitz=lipschitz)
    value = 0.5 * math.log(parameters / samples) + math.log(lipschitz) + math.log(input_bound)
    total = log_sum(log(layer.distance) for layer in layers)
    value += total + math.fsum(log(layer.bound) for layer in layers)
    return _printed("Eq. 7, Long and Sedghi (as printed)", value, "gap")


def _ratios_times_product(layers: Sequence[Layer]) -> float:
    """``log`` of ``sum_j D_j / B_j * prod_j B_j``, as ``sum_j D_j prod_{l != j} B_l`` so that no B_j divides."""
    logs = [log(layer.bound) for layer in layers]
    return log_sum(
        log(layer.distance) + math.fsum(logs[:j] + logs[j + 1 :]) for j, layer in enumerate(layers) if layer.distance
    )


def _printed(
    name: str, value: float, about: Literal["complexity", "gap"] = "complexity", proven: Bound | None = None
) -> Bound:
    log10 = to_log10(value)
    above = proven is not None and log10 >= proven.log10
    return Bound(name, log10, "printed", True if above else None, about)
