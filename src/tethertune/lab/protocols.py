"""Three ways to do the paper's experiments: good practice, what the paper says, and what its authors' code did.

A protocol is a set of defaults. What a user gives wins over it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tethertune.errors import ConfigurationError, did_you_mean

__all__ = ["PROTOCOLS", "Protocol", "find", "under"]


@dataclass(frozen=True)
class Protocol:
    """Defaults of one way to do the experiments.

    Attributes:
        name: The name in configuration files and on the command line.
        description: One sentence.
        training: Defaults of the options of ``tethertune finetune``.
        search: Defaults of the options of ``tethertune search``.
    """

    name: str
    description: str
    training: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)


_COMMON: dict[str, Any] = {
    "size": 224,
    "lr": 1e-4,
    "schedule": "step",
    "batch_size": 128,
    "epochs": 30,
    "bn": "train",
    "augment": False,
}

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "default",
            "Good practice with few images: pooled head that starts at zero, frozen batch-norm statistics.",
        ),
        Protocol(
            "paper",
            "What the paper says (Section 5); where it says nothing, the numbers of its authors' code.",
            training={**_COMMON, "optimizer": "adam", "head": "pool"},
            search={"objective": "loss", "trials": 20},
        ),
        Protocol(
            "authors",
            "What the code published with the paper did, where that differs from the paper or from good practice.",
            training={
                **_COMMON,
                "optimizer": "amsgrad",
                "head": "flatten",
                "interpolation": "nearest",
                "resize": "stretch",
                "scaling": "raw",
                "drop_last": True,
                "convention": "authors",
            },
            search={"objective": "accuracy", "trials": 20, "sampler": "random"},
        ),
    )
}
"""Name -> protocol."""


def find(name: str) -> Protocol:
    """The protocol of a name.

    Raises:
        ConfigurationError: There is none.
    """
    if name not in PROTOCOLS:
        raise ConfigurationError(
            f"--protocol {name} is not known: use {', '.join(PROTOCOLS)}.{did_you_mean(name, PROTOCOLS)}"
        )
    return PROTOCOLS[name]


def under(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of ``finetune`` with the defaults of their ``protocol``, if they name one, in its place.

    Raises:
        ConfigurationError: There is no such protocol.
    """
    options = dict(given)
    return {**find(options.pop("protocol", "default")).training, **options}
