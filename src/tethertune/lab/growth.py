"""How each bound grows with depth, width, input resolution and distance, on real networks.

The comparison of Section 3 and Appendix C of the paper, in numbers. One thing at a time is changed of a ResNet: its
depth, its width, the size of its images, and how far its layers may move. Each layer may move by the same part of its
own norm, in the norm of each bound; the head's ball has radius 1 in that norm. Everything is a bound of the
generalisation gap for a loss with Lipschitz constant 1: twice the complexity where it is one of the complexity, and
without the confidence term, which is the same for all.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import timm
import torch
from torch import Tensor, nn

from tethertune.errors import ConfigurationError
from tethertune.lab import batches, images, models, sources
from tethertune.lab.models import LoadedModel
from tethertune.theory import Bound, OperatorNorms, Ramp
from tethertune.theory.case import Case, Sizes, as_printed
from tethertune.theory.classes import NetworkClass
from tethertune.theory.graph import trace
from tethertune.theory.propagation import Ball
from tethertune.theory.sample import observe, tensors

__all__ = ["DEPTHS", "DISTANCES", "NORMS", "RESOLUTIONS", "WIDTHS", "Growth", "Point", "Sweep", "measure"]

Sweep = Literal["depth", "width", "resolution", "distance"]

DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101")
WIDTHS = (0.125, 0.25, 0.5, 1.0)
RESOLUTIONS = (32, 64, 96, 128, 160, 192, 224)
DISTANCES = tuple(10 ** (k / 2) for k in range(-8, 1))
"""Parts of each layer's norm, from 1e-4 to 1."""
NORMS = ("mars", "kernel_mars", "frobenius", "two_one", "spectral")
"""Fields of :class:`~tethertune.theory.OperatorNorms`; the spectral norm is an upper bound."""

_BASE, _SIZE, _DISTANCE = "resnet18", 128, 0.02
"""What is not changed."""
_SCALED, _STEM, _CHANNELS = "resnet18d", 32, (64, 128, 256, 512)
"""The network whose width is changed, and its channels: its stem can be scaled too, so that no layer comes or goes."""
_CLASSES = 10
_LIPSCHITZ = Ramp(math.sqrt(2))
"""A loss with Lipschitz constant 1."""


@dataclass(frozen=True)
class Point:
    """One network at one setting.

    Attributes:
        sweep: What is changed.
        x: Its value: the number of linear maps of the body, the factor of the channels, the side of the images in
            pixels, or the part of its own norm that each layer may move by.
        network: Its name.
        layers: Linear maps of the body.
        parameters: n.
        norms: log10 of each of :data:`NORMS`, mean over the body's linear maps, batch norm folded in.
        bounds: log10 of each bound of the gap, by its name.
        proven: Names of those that are proven.
    """

    sweep: Sweep
    x: float
    network: str
    layers: int
    parameters: int
    norms: Mapping[str, float]
    bounds: Mapping[str, float]
    proven: tuple[str, ...]


@dataclass(frozen=True)
class Growth:
    """The comparison.

    Attributes:
        model: The network of the sweeps over resolution and distance.
        weights: Where its weights are from; ``"random"``.
        seed: Of all random weights.
        samples: m, images of Fashion-MNIST.
        distance: The part of its own norm that each layer may move by, where that is not what is changed.
        size: Side of the images in pixels, where that is not what is changed.
        points: In the order of the sweeps.
    """

    model: str
    weights: str
    seed: int
    samples: int
    distance: float
    size: int
    points: tuple[Point, ...]

    def sweep(self, name: Sweep) -> list[Point]:
        """The points of one sweep."""
        return [point for point in self.points if point.sweep == name]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"schema": 1, **asdict(self)}


def measure(
    model: str | None = None,
    *,
    seed: int = 0,
    samples: int = 16,
    depths: Sequence[str] = DEPTHS,
    widths: Sequence[float] = WIDTHS,
    resolutions: Sequence[int] = RESOLUTIONS,
    distances: Sequence[float] = DISTANCES,
) -> Growth:
    """Compute every bound along the four sweeps; the same arguments give the same numbers.

    Args:
        model: The network of the sweeps over resolution and distance, with its published weights; see
            :func:`tethertune.lab.models.load`. ``None``: ResNet-18 with random weights, as in the other two sweeps.
        seed: Of the random weights.
        samples: m, images of the embedded Fashion-MNIST.
        depths: Names of timm's ResNets.
        widths: Factors of all channels of a ResNet-18-D.
        resolutions: Sides of the images in pixels.
        distances: Parts of each layer's norm that it may move by.

    Raises:
        ConfigurationError: An unknown network, one that does not take images of these sizes, or a seed out of range.
        NotCoveredError: A network with a node that no bound is proven for.
        CheckpointError: The published weights cannot be read or downloaded.
    """
    if not 0 <= seed < 2**32:
        raise ConfigurationError(f"--seed {seed} is not allowed: use a whole number from 0 to {2**32 - 1}.")
    random = _Random(seed)
    base = random.network(_BASE) if model is None else models.load(model, classes=_CLASSES, size=_SIZE, seed=seed)
    found = [*_over_depth(depths, random, samples), *_over_width(widths, random, samples)]
    subjects = {size: _Subject.of(base, size, samples) for size in {*resolutions, _SIZE}}
    found += [_point("resolution", size, subjects[size], _DISTANCE) for size in resolutions]
    found += [_point("distance", distance, subjects[_SIZE], distance) for distance in distances]
    return Growth(base.name, base.source, seed, samples, _DISTANCE, _SIZE, tuple(found))


def _over_depth(names: Sequence[str], random: "_Random", samples: int) -> Iterator[Point]:
    for name in names:
        subject = _Subject.of(random.network(name), _SIZE, samples)
        yield _point("depth", len(subject.norms), subject, _DISTANCE)


def _over_width(factors: Sequence[float], random: "_Random", samples: int) -> Iterator[Point]:
    for factor in factors:
        channels = tuple(round(factor * count) for count in _CHANNELS)
        loaded = random.network(_SCALED, channels=channels, stem_width=round(factor * _STEM))
        label = f"{_SCALED} x {factor:g}"
        yield _point("width", factor, _Subject.of(replace(loaded, name=label), _SIZE, samples), _DISTANCE)


class _Random:
    """Makes timm's ResNets with random weights; images are prepared for all of them as for the first."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._like = models.load(_BASE, classes=_CLASSES, size=_SIZE, pretrained=False, seed=seed)

    def network(self, name: str, **options: Any) -> LoadedModel:
        """A network whose batch norms have seen images that are not in the sample, so that features keep their size."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            made = timm.create_model(name, num_classes=_CLASSES, zero_init_last=False, **options)
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the plain average
        with torch.no_grad():
            made.train()(_sample(self._like, _SIZE, 16, split="validation")[0])
        return replace(self._like, model=made, name=name)


def _sample(loaded: LoadedModel, size: int, count: int, split: str = "train") -> tuple[Tensor, Tensor]:
    """Images of the embedded Fashion-MNIST as the network takes them, spread evenly over a split, and their labels."""
    source = sources.fashion()
    members = source.splits[split]
    chosen = members[np.linspace(0, len(members) - 1, count).round().astype(int)]
    filter_ = images.resampling(loaded.interpolation)
    pixels = np.stack([images.fit(source.image(index), size, filter_) for index in chosen])
    batch = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return batches.normalise(batch, loaded.mean, loaded.std).contiguous(), torch.from_numpy(source.labels[chosen])


@dataclass(frozen=True)
class _Subject:
    """A network on images of one size, measured."""

    name: str
    case: Case
    parameters: int
    norms: Mapping[int, OperatorNorms]
    biases: Mapping[int, float]

    @classmethod
    def of(cls, loaded: LoadedModel, size: int, samples: int) -> "_Subject":
        model = loaded.model.eval()
        batch = _sample(loaded, size, samples)
        network = trace(model, batch[0], head=loaded.head)
        state = tensors(model)
        norms, biases = {}, {}
        for index, node in network.linears.items():
            weight, bias = node.folded(state)
            norms[index] = node.geometry.norms(weight, "fast")
            biases[index] = 0.0 if bias is None else float(bias.abs().max())
        case = Case(network, observe(network, model, state, [batch]))
        return cls(loaded.name, case, sum(p.numel() for p in model.parameters()), norms, biases)

    def bounds(self, distance: float) -> tuple[Bound, ...]:
        """Every bound where each layer may move by a part of its own norm."""
        balls = {
            index: Ball(norms.mars, distance * norms.mars, bias=self.biases[index])
            for index, norms in self.norms.items()
        }
        proven = self.case.bounds(NetworkClass(balls, 1.0, 0.0, 0.0, ()), _LIPSCHITZ)
        before = list(self.norms.values())
        moved = [norms.scaled(distance) for norms in before]
        return (*as_printed(self.case, proven, Sizes(before, moved, 1.0, self.parameters)), *proven.all)


def _point(sweep: Sweep, x: float, subject: _Subject, distance: float) -> Point:
    bounds = subject.bounds(distance)
    norms = {
        name: math.fsum(math.log10(getattr(norms, name)) for norms in subject.norms.values()) / len(subject.norms)
        for name in NORMS
    }
    return Point(
        sweep=sweep,
        x=x,
        network=subject.name,
        layers=len(subject.norms),
        parameters=subject.parameters,
        norms=norms,
        bounds={bound.name: bound.log10 + (math.log10(2) if bound.about == "complexity" else 0) for bound in bounds},
        proven=tuple(bound.name for bound in bounds if bound.kind == "certificate"),
    )
