"""Optimisers by name, and the learning rate at each step."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from tethertune.errors import ConfigurationError, did_you_mean
from tethertune.lab.config import FinetuneConfig

__all__ = ["build", "lr_factor"]

_OWN: dict[str, Callable[..., Optimizer]] = {
    "amsgrad": partial(torch.optim.Adam, amsgrad=True),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}


def build(config: FinetuneConfig, groups: Sequence[dict[str, Any]]) -> Optimizer:
    """The optimiser that the configuration names, with its fused implementation where there is one.

    Args:
        config: Read for ``optimizer``, ``lr`` and ``weight_decay``.
        groups: Parameter groups, each with its ``lr``.

    Raises:
        ConfigurationError: An unknown name, or an optimiser that cannot be used here.
    """
    make = _find(config.optimizer)
    options: dict[str, Any] = {"lr": config.lr}
    known = inspect.signature(make).parameters
    if "fused" in known:
        options["fused"] = True
    if "weight_decay" in known or config.weight_decay:
        options["weight_decay"] = config.weight_decay
    try:
        _rehearse(make, options)
        return make(groups, **options)
    except Exception as error:  # each optimiser refuses in its own way
        raise ConfigurationError(
            f"--optimizer {config.optimizer} cannot be used in a plain training loop ({error}): use {', '.join(_OWN)}."
        ) from error


def _rehearse(make: Callable[..., Optimizer], options: Mapping[str, Any]) -> None:
    """One step on a toy: some optimisers want a closure, sparse gradients, or second derivatives only then."""
    toy = torch.nn.Parameter(torch.eye(2))
    toy.grad = torch.ones(2, 2)
    make([{"params": [toy], "lr": options["lr"]}], **options).step()


def _find(name: str) -> Callable[..., Optimizer]:
    """A table of our own first, then timm's names, then the classes of ``torch.optim``."""
    if name.lower() in _OWN:
        return _OWN[name.lower()]
    from timm.optim import create_optimizer_v2, list_optimizers

    timm_names = list_optimizers()
    if name.lower().removeprefix("lookahead_") in timm_names:

        def make(groups: Any, lr: float, weight_decay: float) -> Optimizer:
            optimizer: Optimizer = create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=weight_decay)
            return optimizer

        return make
    classes = {
        key.lower(): cls
        for key, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    }
    if name.lower() in classes:
        return classes[name.lower()]
    suggestion = did_you_mean(name.lower(), [*_OWN, *timm_names, *classes])
    raise ConfigurationError(
        f"--optimizer {name} is not known: use {', '.join(_OWN)}, or a name of timm or torch.optim.{suggestion}"
    )


def lr_factor(schedule: str, step: int, steps: int) -> float:
    """What the learning rate is multiplied by in a step of a run.

    Args:
        schedule: ``"step"``: halved after two thirds of the run, as the paper's authors. ``"cosine"``: half a cosine
            wave from 1 to 0. ``"constant"``: 1.
        step: The step, from 0.
        steps: The number of steps of the whole run.

    Example:
        >>> [lr_factor("step", step, 6) for step in range(6)]
        [1.0, 1.0, 1.0, 1.0, 0.5, 0.5]
    """
    if schedule == "step":
        return 0.5 if 3 * step >= 2 * steps else 1.0
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / steps))
    return 1.0
