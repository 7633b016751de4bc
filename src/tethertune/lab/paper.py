"""The figures that the paper printed: sizes of its data sets (Table 1) and test accuracies (Tables 2 and 3)."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["NETWORKS", "Printed", "accuracy", "network", "sizes"]

_TABLES = Path(__file__).parent / "assets" / "paper" / "tables.toml"

NETWORKS = {"resnet101": "Table 2, ResNet-101", "efficientnet_b0": "Table 3, EfficientNet-B0"}
"""The paper's networks, and where their accuracies are printed."""


@dataclass(frozen=True)
class Printed:
    """A test accuracy as the paper prints it, as fractions.

    Attributes:
        mean: Mean over five runs.
        deviation: Their standard deviation.
    """

    mean: float
    deviation: float


def network(model: str) -> str | None:
    """The network of the paper that a model is, whoever published its weights; None if it is none of them.

    Args:
        model: Its name, with or without a library before it and a tag after it.

    Example:
        >>> network("tf_efficientnet_b0.aa_in1k"), network("torchvision:resnet101"), network("resnet50")
        ('efficientnet_b0', 'resnet101', None)
    """
    architecture = model.rsplit(":", 1)[-1].rsplit("/", 1)[-1].split(".", 1)[0].removeprefix("tf_")
    return architecture if architecture in NETWORKS else None


def accuracy(network: str, method: str, data: str) -> Printed | None:
    """What the paper prints for a network, a method and a data set; None where it prints nothing."""
    found = _tables()["accuracy"].get(network, {}).get(method, {}).get(data)
    return Printed(*(value / 100 for value in found)) if found else None


def sizes(data: str) -> Mapping[str, int] | None:
    """Images of ``train``, ``validation`` and ``test``, and ``classes``, as in Table 1; None for another data set."""
    found: Mapping[str, int] | None = _tables()["datasets"].get(data)
    return found


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(_TABLES.read_text(encoding="utf-8"))
