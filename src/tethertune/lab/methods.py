"""The regularisation methods, once: command line, configuration, search, reports and docs read this table.

How a method is built for a model is told by :mod:`tethertune.lab.regularisers`, so that this table needs no torch.
"""

from dataclasses import dataclass, field
from math import exp
from typing import Literal

__all__ = ["METHODS", "HyperParameter", "Method"]


@dataclass(frozen=True)
class HyperParameter:
    """One of the two numbers that a method is tuned by.

    Attributes:
        name: The configuration key.
        low: Lower end of the range that the paper's authors searched.
        high: Upper end; they drew from it log-uniformly.
    """

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class Method:
    """One way to keep fine-tuned weights near the pre-trained ones.

    Attributes:
        name: The name on the command line.
        description: One sentence.
        kind: ``"constraint"`` (a hard ball), ``"penalty"`` (a term on the weights), ``"features"`` (a term on the
            feature maps), or ``"none"``.
        norm: The norm of the distance, where there is one.
        body: The hyper-parameter of the pre-trained layers.
        head: The hyper-parameter of the new head.
        defaults: Configuration values that are used when none of the method's hyper-parameters is given.
    """

    name: str
    description: str
    kind: Literal["none", "constraint", "penalty", "features"]
    norm: Literal["mars", "frobenius"] | None = None
    body: HyperParameter | None = None
    head: HyperParameter | None = None
    defaults: dict[str, float] = field(default_factory=dict)

    @property
    def accepts(self) -> tuple[str, ...]:
        """The configuration keys of its hyper-parameters."""
        return _ACCEPTS[self.kind]


_ACCEPTS = {
    "none": (),
    "constraint": ("radius", "relative_radius", "head_radius"),
    "penalty": ("strength", "head_strength"),
    "features": ("strength", "head_strength"),
}
_RADII = HyperParameter("radius", exp(0.5), exp(3.5)), HyperParameter("head_radius", exp(0.5), exp(3.5))
_STRENGTHS = HyperParameter("strength", exp(-10), exp(-1)), HyperParameter("head_strength", exp(-10), exp(-1))

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("none", "Plain fine-tuning: nothing holds the weights.", "none"),
        Method(
            "l2-sp",
            "A penalty on the squared Frobenius distance of all layers from their pre-trained weights.",
            "penalty",
            "frobenius",
            *_STRENGTHS,
            defaults={"strength": 0.1, "head_strength": 0.1},
        ),
        Method(
            "mars-sp",
            "A penalty on the MARS distance (largest row l1 sum) of each layer from its pre-trained weights.",
            "penalty",
            "mars",
            *_STRENGTHS,
            defaults={"strength": 0.001, "head_strength": 0.01},
        ),
        Method(
            "delta",
            "A penalty on how far the last feature map moves from the pre-trained network's, channel by channel.",
            "features",
            "frobenius",
            *_STRENGTHS,
            defaults={"strength": 3.0, "head_strength": 0.1},
        ),
        Method(
            "l2-pgm",
            "A projection after each step that keeps each layer's Frobenius distance within its radius.",
            "constraint",
            "frobenius",
            *_RADII,
            defaults={"relative_radius": 0.03},
        ),
        Method(
            "mars-pgm",
            "A projection after each step that keeps each layer's MARS distance within its radius.",
            "constraint",
            "mars",
            *_RADII,
            defaults={"relative_radius": 0.02},
        ),
    )
}
"""Name -> method, in the order of the paper's tables. The defaults are those of ``docs``' measurements with few images
(ten a class): a start, not a substitute for a search."""
