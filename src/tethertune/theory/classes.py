"""The class of networks that a certificate is about: a ball for each linear map, and what choosing them cost.

Three modes. ``declared``: radii that were fixed before the data. ``grid``: the measured distances, rounded up to a grid
that was fixed before the data, which is paid for in confidence. ``measured``: the distances as they are, for free, and
then the result is a measurement, not a certificate.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tethertune import rows
from tethertune.errors import ConfigurationError, PatternError, ReferenceMismatchError, did_you_mean
from tethertune.theory import grid
from tethertune.theory.maps import Convolution
from tethertune.theory.nodes import Linear, Network
from tethertune.theory.propagation import Ball

__all__ = ["Measured", "Mode", "NetworkClass", "Sharing", "choose", "measure"]

Mode = Literal["declared", "grid", "measured"]
Sharing = Literal["shared", "per-layer"]

_SLACK = 1 + 1e-5
"""A projection in float32 leaves rows up to 3e-7 above their radius; declared balls are this much larger."""


@dataclass(frozen=True)
class Measured:
    """One linear map as it is.

    Attributes:
        ball: Its folded distance and bias shift from the reference.
        kernel: Distance of the weight alone in the constraint's norm (MARS or Frobenius of the kernel).
        same_affine: Whether bias, batch norm and its statistics are exactly the reference's.
    """

    ball: Ball
    kernel: float
    same_affine: bool


@dataclass(frozen=True)
class NetworkClass:
    """A class of networks.

    Attributes:
        balls: By position of the linear map.
        head_bound: B_V, the largest row l1 norm of the head's weights.
        head_bias: The largest absolute value of an entry of the head's bias.
        price: Nats paid for what was chosen on the sample.
        paid: What was paid for, in words.
    """

    balls: Mapping[int, Ball]
    head_bound: float
    head_bias: float
    price: float
    paid: tuple[str, ...]


def measure(
    network: Network,
    state: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    norm: Literal["mars", "frobenius"] = "mars",
) -> dict[int, Measured]:
    """Measure every linear map of the body against the reference, in float64.

    Raises:
        ReferenceMismatchError: The reference lacks a tensor of the network, or has one of another shape.
    """
    for node in network.linears.values():
        for name in node.parameters:
            if name not in reference:
                raise ReferenceMismatchError(f"The reference has no {name}: it is of another network.")
            if reference[name].shape != state[name].shape:
                raise ReferenceMismatchError(
                    f"{name} is {tuple(state[name].shape)} in the network and {tuple(reference[name].shape)} in the"
                    " reference: it is of another network."
                )
    return {index: _measure(node, state, reference, norm) for index, node in network.linears.items()}


def _measure(node: Linear, state: Mapping[str, Tensor], reference: Mapping[str, Tensor], norm: str) -> Measured:
    weight, bias = node.folded(state)
    weight0, bias0 = node.folded(reference)
    moved = weight - weight0
    ball = Ball(
        reference=node.geometry.mars(weight0),
        distance=node.geometry.mars(moved),
        shift=0.0 if bias is None or bias0 is None else float((bias - bias0).abs().max()),
        bias=0.0 if bias0 is None else float(bias0.abs().max()),
    )
    if not all(math.isfinite(value) for value in (ball.reference, ball.distance, ball.shift, ball.bias)):
        raise ConfigurationError(f"{node.name} has weights that are not finite.")
    del weight, weight0  # a large layer's are gigabytes
    kernel = 0.0
    if node.weight is not None:
        if node.norm is not None:
            moved = state[node.weight].detach().double() - reference[node.weight].detach().double()
        geometry = node.geometry
        if norm == "frobenius":
            kernel = float(moved.norm())
        elif isinstance(geometry, Convolution):
            kernel = geometry.kernel_mars(moved)
        else:
            kernel = geometry.mars(moved)
    affine = [name for name in node.parameters if name != node.weight]
    return Measured(ball, kernel, all(torch.equal(state[name], reference[name]) for name in affine))


def choose(
    network: Network,
    measured: Mapping[int, Measured],
    state: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    *,
    mode: Mode,
    sharing: Sharing = "shared",
    radii: Mapping[str, float] | None = None,
    norm: Literal["mars", "frobenius"] = "mars",
    affine: Literal["free", "frozen"] = "free",
    frozen: Collection[str] = (),
) -> NetworkClass:
    """Choose the class that the trained network is in.

    Args:
        network: The traced network.
        measured: From :func:`measure`, in the norm of the radii.
        state: The trained network's tensors.
        reference: The reference's tensors.
        mode: ``declared``, ``grid`` or ``measured``. In ``declared`` mode what has no declared radius is on the grid.
        sharing: One grid index for all layers, or one for each.
        radii: Declared radii by the weight's name; that of the head is measured from 0, as is that of the head's bias,
            under its own name: the largest absolute value of its entries. A bias with a radius of 0 is declared in
            ``grid`` mode too.
        norm: The norm of the radii: ``mars``, or ``frobenius`` (of the kernel).
        affine: ``frozen``: biases and batch norm were held at the reference, by declaration.
        frozen: Names or patterns of parameters that were held at the reference, by declaration; a map with a batch norm
            is frozen where all of both is.

    Raises:
        ConfigurationError: A radius below 0, a layer outside of its declared ball, or one that was declared frozen and
            has moved.
        PatternError: A name that is no layer's.
    """
    for name, given, allowed in (("mode", mode, Mode), ("sharing", sharing, Sharing)):
        _check_word(name, given, get_args(allowed))
    _check_word("norm", norm, ("mars", "frobenius"))
    _check_word("affine", affine, ("free", "frozen"))
    radii = dict(radii or {})
    _check_names(network, radii, frozen)
    distances: dict[int, float] = {}
    shifts: dict[int, float] = {}
    for index, node in network.linears.items():
        found, radius = measured[index], radii.get(node.weight or "", math.inf)
        others = [name for name in node.parameters if name != node.weight]
        still = affine == "frozen" or (bool(others) and _all_match(others, frozen))
        held = radius == 0 or _all_match([node.weight] if node.weight else others, frozen)
        _check_frozen(node, found, held=held, still=still)
        if still or node.parameters == (node.weight,):
            shifts[index] = 0.0
        if not still and node.norm is not None:
            continue  # a batch norm that moves scales the weights by a factor that no radius bounds
        if held or node.weight is None:
            distances[index] = 0.0
        elif mode == "declared" and math.isfinite(radius):
            distances[index] = _declared(node, found, radius, norm, reference)
    purse = _Purse(sharing)
    for kind, known in (("distances", distances), ("bias shifts", shifts)):
        rest = {index: found.ball for index, found in measured.items() if index not in known}
        values = [ball.distance if kind == "distances" else ball.shift for ball in rest.values()]
        if rest and mode != "measured":
            values = purse.cover(f"{kind} of {len(rest)} layers", values, _scales(list(rest.values()), kind))
        known.update(zip(rest, values, strict=True))
    head, head_bias = _head(network.head, state, purse, mode=mode, radii=radii, norm=norm)
    balls = {
        index: Ball(found.ball.reference, distances[index], shifts[index], found.ball.bias)
        for index, found in measured.items()
    }
    return NetworkClass(balls, head, head_bias, purse.total, tuple(purse.paid))


def _check_frozen(node: Linear, found: Measured, *, held: bool, still: bool) -> None:
    if still and not found.same_affine:
        raise ConfigurationError(f"{node.name} was declared frozen, but its bias or batch norm has moved.")
    if held and found.kernel > 0:
        raise ConfigurationError(f"{node.name} was declared frozen, but its weights have moved.")


class _Purse:
    """Adds up what cells of the grid cost."""

    def __init__(self, sharing: Sharing) -> None:
        self.sharing = sharing
        self.total = 0.0
        self.paid: list[str] = []

    def cover(self, what: str, values: list[float], scales: list[float]) -> list[float]:
        """The radii of the cells that hold the values."""
        if self.sharing == "shared":
            cells = grid.cover_together(values, scales)
            self.total += cells[0].price
        else:
            cells = [grid.cover(value, scale) for value, scale in zip(values, scales, strict=True)]
            self.total += math.fsum(cell.price for cell in cells)
        self.paid.append(what)
        return [cell.radius for cell in cells]


def _scales(balls: list[Ball], kind: str) -> list[float]:
    """The grid's scales, which only the reference may decide; where that is 0, the least of the other layers'."""
    sizes = [ball.reference if kind == "distances" else ball.bias for ball in balls]
    least = min((size for size in sizes if size > 0), default=1.0)
    return [size if size > 0 else least for size in sizes]


def _declared(node: Linear, found: Measured, radius: float, norm: str, reference: Mapping[str, Tensor]) -> float:
    """MARS radius of the folded map from the declared radius of its weight."""
    assert node.weight is not None
    weight = reference[node.weight]
    _check_inside(node.weight, found.kernel, radius, norm)
    scale = node.scale(reference)
    largest = 1.0 if scale is None else float(scale.abs().max())
    return largest * radius * _SLACK * _row_factor(node, weight, norm)


def _row_factor(node: Linear, weight: Tensor, norm: str) -> float:
    """A row's l1 norm is at most the root of its length times the kernel's Frobenius norm."""
    if norm == "mars":
        return 1.0
    geometry = node.geometry
    if isinstance(geometry, Convolution) and geometry.transposed:
        return math.sqrt(weight.numel() / (weight.shape[1] * geometry.groups))
    return math.sqrt(weight.numel() / weight.shape[0])


def _head(
    head: Linear,
    state: Mapping[str, Tensor],
    purse: _Purse,
    *,
    mode: Mode,
    radii: Mapping[str, float],
    norm: Literal["mars", "frobenius"],
) -> tuple[float, float]:
    """B_V and the bound of the bias: each its declared ball's, or the grid's."""
    assert head.weight is not None
    weight, bias = head.folded(state)
    largest = float(weight.abs().sum(1).max())
    highest = 0.0 if bias is None else float(bias.abs().max())
    if mode == "measured":
        return largest, highest
    radius = radii.get(head.weight, math.inf)
    if mode == "grid" or not math.isfinite(radius):
        bound = purse.cover("the head's norm", [largest], [1.0])[0]
    else:
        if radius == 0:
            raise ConfigurationError(f"The declared radius of the head is {radius}: it must be above 0.")
        _check_inside(head.weight, float(weight.norm()) if norm == "frobenius" else largest, radius, norm)
        bound = radius * _SLACK * _row_factor(head, weight, norm)
    if head.bias is None:
        return bound, 0.0
    radius = radii.get(head.bias, math.inf)
    if radius == 0 or (mode == "declared" and math.isfinite(radius)):
        _check_inside(head.bias, highest, radius, norm)
        return bound, radius * _SLACK
    return bound, purse.cover("the head's bias", [highest], [1.0])[0]


def _check_inside(name: str, distance: float, radius: float, norm: str) -> None:
    if not distance <= radius * _SLACK:  # nor NaN
        raise ConfigurationError(
            f"{name} is at {norm} distance {distance:.6g}, outside of its declared radius {radius:.6g}: the"
            " network is not of the declared class. Use mode='grid'."
        )


def _all_match(names: Iterable[str], patterns: Collection[str]) -> bool:
    return all(any(rows.matches(name, pattern) for pattern in patterns) for name in names)


def _check_word(argument: str, given: str, allowed: Sequence[str]) -> None:
    if given not in allowed:
        raise ConfigurationError(
            f"{argument}={given!r} is not known: use {', '.join(map(repr, allowed))}.{did_you_mean(given, allowed)}"
        )


def _check_names(network: Network, radii: Mapping[str, float], frozen: Collection[str]) -> None:
    nodes = [*network.linears.values(), network.head]
    weights = {node.weight for node in nodes if node.weight}
    holds = weights | ({network.head.bias} if network.head.bias else set())
    for name, radius in radii.items():
        if name not in holds:
            raise PatternError(
                f"radii has {name!r}, which is no layer's weight, nor the head's bias.{did_you_mean(name, holds)}"
            )
        if not radius >= 0:  # nor NaN
            raise ConfigurationError(f"The declared radius of {name} is {radius}: it must be 0 or more.")
    for pattern in frozen:
        if not any(rows.matches(name, pattern) for node in nodes for name in node.parameters):
            raise PatternError(f"frozen={pattern!r} matches no layer.{did_you_mean(pattern, weights)}")
