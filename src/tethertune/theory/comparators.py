"""Bounds of other papers, to compare with.

Two of them have explicit constants and are re-derived in ``docs/theory.md``, so they are certificates of the
generalisation gap for losses in [0, 1]. The others have their constants dropped or quoted, and are labelled
``comparator``.
"""

import math
from collections.abc import Sequence

from tethertune.errors import ConfigurationError
from tethertune.theory.bounds import Bound, Layer, log, log_sum, positive, to_log10
from tethertune.theory.printed import bartlett_sum

__all__ = [
    "bartlett_explicit",
    "golowich_frobenius",
    "golowich_rows",
    "long_sedghi_explicit",
    "neyshabur_pac_bayes",
    "neyshabur_two_layers",
]


def bartlett_explicit(
    layers: Sequence[Layer],
    *,
    samples: int,
    max_width: int,
    input_bound: float,
    two_one_distances: Sequence[float],
    lipschitz: float = 1.0,
) -> Bound:
    r"""Bartlett et al. 2017, Theorem 3.3 with Dudley's integral: the gap, with all constants (no confidence term).

    .. math:: \frac{8}{m^{3/2}} + 36 \ln m \sqrt{\ln 2W^2}\, \rho C_2 T / \sqrt m, \qquad
       T = \Big(\sum_j (D^{2,1}_j / B_j)^{2/3}\Big)^{3/2} \prod_j B_j

    Args:
        layers: Spectral norm bound of each layer, the head among them.
        samples: m, the number of training examples.
        max_width: W, the largest flattened size of a layer's output, the input among them.
        input_bound: The largest l2 norm of an input.
        two_one_distances: (2,1) distance of each layer.
        lipschitz: rho, the Lipschitz constant of the loss.
    """
    positive(samples=samples, max_width=max_width, input_bound=input_bound, lipschitz=lipschitz)
    if len(two_one_distances) != len(layers):
        raise ConfigurationError(f"{len(two_one_distances)} two_one_distances given for {len(layers)} layers.")
    main = (
        math.log(36)
        + log(math.log(samples))
        + 0.5 * math.log(math.log(2) + 2 * math.log(max_width))
        + math.log(lipschitz)
        + math.log(input_bound)
        - 0.5 * math.log(samples)
        + bartlett_sum(layers, two_one_distances)
    )
    value = log_sum((main, math.log(8) - 1.5 * math.log(samples)))
    return Bound("Bartlett et al. (explicit)", to_log10(value), "certificate", is_upper_bound=True, about="gap")


def long_sedghi_explicit(
    layers: Sequence[Layer], *, samples: int, parameters: int, input_bound: float, lipschitz: float = 1.0
) -> Bound:
    r"""A parameter-counting bound of the kind of Long and Sedghi 2019: the gap, with all constants.

    .. math:: 24 I \sqrt{n/m}\, \rho C_2 \Big(\sum_j D_j / B_j\Big) \prod_j B_j, \qquad
       I = \int_0^1 \sqrt{\ln (3/u)}\, du

    From a cover of the product of the balls by ``(3/u)^n`` points and Dudley's integral.

    Args:
        layers: Spectral norm bound ``||W0_j|| + D_j`` and distance of each layer, the head among them.
        samples: m, the number of training examples.
        parameters: n, the number of parameters.
        input_bound: The largest l2 norm of an input.
        lipschitz: rho, the Lipschitz constant of the loss.
    """
    positive(samples=samples, parameters=parameters, input_bound=input_bound, lipschitz=lipschitz)
    root = math.sqrt(math.log(3))
    integral = root + 1.5 * math.sqrt(math.pi) * math.erfc(root)
    logs = [log(layer.bound) for layer in layers]
    moved = log_sum(log(layer.distance) + math.fsum(logs[:j] + logs[j + 1 :]) for j, layer in enumerate(layers))
    value = math.log(24 * integral * math.sqrt(parameters / samples) * lipschitz * input_bound) + moved
    return Bound("Long and Sedghi (explicit)", to_log10(value), "certificate", is_upper_bound=True, about="gap")


def neyshabur_pac_bayes(
    layers: Sequence[Layer],
    *,
    samples: int,
    max_width: int,
    input_bound: float,
    frobenius_distances: Sequence[float],
    margin: float = 1.0,
) -> Bound:
    r"""Neyshabur et al. 2018 (PAC-Bayes), constants dropped, centred at the reference.

    .. math:: \sqrt{\frac{C_2^2 L^2 h \ln(L h) \prod_j B_j^2 \sum_j \|W_j - W^0_j\|_F^2 / B_j^2}{\gamma^2 m}}

    The theorem has ``||W_j||_F``; the form centred at the reference is common but not proven.

    Args:
        layers: Spectral norm bound of each layer.
        samples: m, the number of training examples.
        max_width: h, the largest width.
        input_bound: The largest l2 norm of an input.
        frobenius_distances: Frobenius distance of each layer.
        margin: The margin of the loss.
    """
    positive(samples=samples, max_width=max_width, input_bound=input_bound, margin=margin)
    depth = len(layers)
    logs = [log(layer.bound) for layer in layers]
    terms = [2 * (log(d) + math.fsum(logs[:j] + logs[j + 1 :])) for j, d in enumerate(frobenius_distances)]
    value = (
        math.log(input_bound * depth / margin)
        + 0.5 * (math.log(max_width) + log(math.log(depth * max_width)) - math.log(samples))
        + 0.5 * log_sum(terms)
    )
    return Bound("Neyshabur et al. 2018 (constants dropped)", to_log10(value), "comparator", about="gap")


def neyshabur_two_layers(
    *,
    head_rows: Sequence[float],
    row_distances: Sequence[float],
    frozen_responses: Sequence[float],
    samples: int,
    classes: int,
    data_norm: float,
    margin: float = 1.0,
) -> Bound:
    r"""Neyshabur et al. 2019, networks with one hidden layer: the complexity term.

    .. math:: \frac{2 \sqrt{2c} + 2}{\gamma m} \sum_k \|v_k\|_2 \big(\|u_k - u^0_k\|_2 \|X\|_F + \|u^0_k X\|_2\big)

    Args:
        head_rows: l2 norm of each hidden unit's outgoing weights.
        row_distances: l2 distance of each hidden unit's incoming weights from the reference.
        frozen_responses: l2 norm, over the sample, of each reference unit's response.
        samples: m, the number of training examples.
        classes: c, the number of classes.
        data_norm: Frobenius norm of the matrix of all inputs.
        margin: The margin of the loss.
    """
    positive(samples=samples, classes=classes, data_norm=data_norm, margin=margin)
    total = math.fsum(
        v * (d * data_norm + f) for v, d, f in zip(head_rows, row_distances, frozen_responses, strict=True)
    )
    value = math.log((2 * math.sqrt(2 * classes) + 2) / (margin * samples)) + log(total)
    return Bound("Neyshabur et al. 2019 (two layers)", to_log10(value), "comparator")


def golowich_frobenius(layers: Sequence[Layer], *, samples: int, input_bound: float) -> Bound:
    r"""Golowich et al. 2018, Theorem 1, one real output: :math:`(\sqrt{2 L \log 2} + 1) \prod B_j\, C_2 / \sqrt m`."""
    positive(samples=samples, input_bound=input_bound)
    value = math.log(math.sqrt(2 * len(layers) * math.log(2)) + 1) + math.log(input_bound) - 0.5 * math.log(samples)
    value += math.fsum(log(layer.bound) for layer in layers)
    return Bound("Golowich et al. 2018, Theorem 1", to_log10(value), "comparator")


def golowich_rows(layers: Sequence[Layer], *, samples: int, input_dim: int, input_alpha: float) -> Bound:
    r"""Golowich et al. 2018, Theorem 2 (row l1 norms), one real output.

    .. math:: 2 \prod_j B_j \sqrt{L + 1 + \log d}\, \alpha_0 / \sqrt m

    with the largest root mean square ``input_alpha`` of an input's entry over the sample. The product certificate is
    its form for several outputs.
    """
    positive(samples=samples, input_dim=input_dim, input_alpha=input_alpha)
    value = math.log(2) + 0.5 * math.log(len(layers) + 1 + math.log(input_dim)) + math.log(input_alpha)
    value += math.fsum(log(layer.bound) for layer in layers) - 0.5 * math.log(samples)
    return Bound("Golowich et al. 2018, Theorem 2", to_log10(value), "comparator")
