"""What a run writes of itself: the descriptions in ``run.json``, ``distances.json`` and its weights' file."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tethertune.constraint import Constraint
from tethertune.lab import machine
from tethertune.lab.config import FinetuneConfig
from tethertune.lab.data import Dataset
from tethertune.lab.models import LoadedModel
from tethertune.measure import Displacement

__all__ = ["described", "layers", "metadata"]


def described(config: FinetuneConfig, loaded: LoadedModel, dataset: Dataset) -> dict[str, Any]:
    """Configuration, versions, images and network: what is known of a run before it begins, for ``run.json``."""
    return {
        "hash": config.hash,
        "command": config.command(),
        "task": config.task,
        "config": config.to_dict(),
        "versions": machine.versions(),
        "data": {
            "name": dataset.name,
            "classes": list(dataset.classes),
            "sizes": dataset.sizes,
            "split": dataset.split,
            "fingerprint": dataset.fingerprint,
        },
        "model": {
            "name": loaded.name,
            "source": loaded.source,
            "weights_sha256": loaded.weights_sha256,
            "license": _license(config, loaded),
            "head": loaded.head,
            "size": loaded.size,
            "mean": list(loaded.mean),
            "std": list(loaded.std),
            "interpolation": loaded.interpolation,
            "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        },
    }


def layers(moved: Mapping[str, Displacement], constraint: Constraint | None) -> dict[str, dict[str, Any]]:
    """Every linear map with how far it moved, and its ball where it has one, for ``distances.json``."""
    balls = {} if constraint is None else constraint.distances()
    return {name: asdict(displacement) | _ball(balls.get(name)) for name, displacement in moved.items()}


def metadata(config: FinetuneConfig, loaded: LoadedModel, dataset: Dataset, alpha: float) -> dict[str, str]:
    """What the weights' file says of itself.

    Args:
        config: The run.
        loaded: Its network.
        dataset: Its images.
        alpha: Where between the reference and the trained weights these lie; 1 for the trained ones.
    """
    told = {
        "base_model": loaded.name,
        "base_sha256": loaded.weights_sha256 or "",
        "base_source": loaded.source,
        "head": loaded.head,
        "size": str(loaded.size),
        "classes": json.dumps(dataset.classes, ensure_ascii=False),
        "method": config.method,
        "tethertune_version": machine.versions()["tethertune"],
    }
    given = config.hyper_parameters | ({"alpha": alpha} if alpha < 1 else {})
    return told | {key: str(value) for key, value in given.items()}


def _ball(ball: Any) -> dict[str, Any]:
    return {key: getattr(ball, key, None) for key in ("norm", "radius", "value", "active_rows")}


def _license(config: FinetuneConfig, loaded: LoadedModel) -> str | None:
    """The licence of the published weights, where timm knows it."""
    published: dict[str, Any] = getattr(loaded.model, "pretrained_cfg", {})
    return None if config.weights or Path(config.model).exists() else published.get("license")
