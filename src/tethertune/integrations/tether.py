"""What the callbacks of all trainers share: when to take the reference, when to attach, and what a checkpoint says.

A trainer loads a checkpoint into the model some time between its construction and the first step. The reference has
to be taken before that, and what the checkpoint says of its own reference compared after it.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from tethertune.attachment import inner_optimizer
from tethertune.constraint import Constraint
from tethertune.errors import AttachError, ConfigurationError, ReferenceMismatchError, did_you_mean
from tethertune.penalty import Penalty
from tethertune.sharding import is_sharded

__all__ = ["Log", "Tether", "measure_constraint", "measure_penalty"]

Log = Literal["summary", "layers", "off"]
"""What a callback reports: a few numbers over all layers, one number for every layer besides, or nothing."""

Kind = TypeVar("Kind", Constraint, Penalty)


class Tether(Generic[Kind]):
    """A constraint or penalty on the way through a trainer's life.

    Args:
        kind: :class:`~tethertune.Constraint` or :class:`~tethertune.Penalty`.
        options: Its keyword arguments.
        log: What to report.

    Attributes:
        built: The constraint or penalty; ``None`` until the model has its weights.
    """

    def __init__(self, kind: type[Kind], options: Mapping[str, Any], log: Log) -> None:
        if log not in get_args(Log):
            raise ConfigurationError(
                f"log={log!r} is not known: use 'summary', 'layers' or 'off'.{did_you_mean(str(log), get_args(Log))}"
            )
        self.built: Kind | None = None
        self.log = log
        self._kind: type[Kind] = kind
        self._options = dict(options)
        self._model: nn.Module | None = None
        self._attached: list[Optimizer] = []

    def take_reference(self, model: nn.Module) -> None:
        """Build around the model as it is now, if its weights are there already (not on the meta device)."""
        weights = list(model.parameters())
        if self.built is None and weights and not any(weight.is_meta for weight in weights):
            self._build(model, self._options.get("reference"))

    def begin(self, model: nn.Module, *, resumed: bool) -> Kind:
        """The constraint or penalty on the model that is about to be trained.

        Args:
            model: That model, wrapped and prepared; its weights are of a checkpoint where ``resumed``.
            resumed: Whether it is.

        Raises:
            ReferenceMismatchError: A checkpoint is in the model, and the reference was not taken before.
            AttachError: The parameters are flattened (FSDP1).
        """
        flattened = next((m for m in model.modules() if type(m).__name__ == "FullyShardedDataParallel"), None)
        if flattened is not None:
            raise AttachError(
                "FSDP1 (FullyShardedDataParallel) flattens the parameters, so that no layer has rows: use FSDP2"
                " (fsdp_config={'version': 2} in transformers, ModelParallelStrategy in Lightning)."
            )
        given = self._options.get("reference")
        same = self._model is not None and any(module is self._model for module in model.modules())
        if self.built is None or not same:
            reference = given
            if resumed and given is None:
                if self.built is None:
                    raise ReferenceMismatchError(
                        "The model holds a checkpoint's weights already, and the callback has not seen the pre-trained"
                        " ones: give it to the trainer when that is made (callbacks=[...]), or pass reference= the"
                        " pre-trained weights."
                    )
                reference = self.built._reference
            self._build(model, reference)
        assert self.built is not None
        return self.built

    def attach(self, *optimizers: Optimizer) -> None:
        """Attach to the optimisers, once: a trainer may train again with the same ones."""
        assert self.built is not None
        inner = [inner_optimizer(optimizer) for optimizer in optimizers]
        if [id(optimizer) for optimizer in inner] != [id(optimizer) for optimizer in self._attached]:
            self.built.attach(*inner)
            self._attached = inner
        elif isinstance(self.built, Constraint):
            self.built.project()

    def check(self, saved: Mapping[str, Any] | None) -> None:
        """Compare with what a checkpoint says.

        Args:
            saved: The state dict that it holds; ``None`` if it holds none.

        Raises:
            ReferenceMismatchError: Another reference, or a checkpoint that was saved without the callback.
            ConfigurationError: Other settings.
        """
        assert self.built is not None
        name = self._kind.__name__.lower()
        if saved is None:
            raise ReferenceMismatchError(
                f"The checkpoint was saved without this {name}, so its weights may be anywhere: start a new training"
                " from them with reference= the pre-trained weights instead of resuming."
            )
        given = self.built.state_dict()["settings"]
        for key, value in saved["settings"].items():
            if key in given and given[key] != value:
                raise ConfigurationError(
                    f"The checkpoint was saved with {key}={value!r}, this {name} has {given[key]!r}: resume with the"
                    " options of the interrupted training, or start a new one."
                )
        self.built.load_state_dict(saved)

    def _build(self, model: nn.Module, reference: Any) -> None:
        self.built = self._kind(model, **{**self._options, "reference": reference})
        self._model = model
        self._attached = []


def measure_constraint(constraint: Constraint, log: Log) -> dict[str, float]:
    """What there is to report of a constraint: distances as shares of their radii. On sharded weights, collective.

    Args:
        constraint: It.
        log: ``"summary"``: the largest and the median share, and the part of the layers that are at their radius.
            ``"layers"``: also every layer's distance, by its name.
    """
    if log == "off":
        return {}
    distances = constraint.distances()
    shares = [d.value / d.radius if d.radius else 0.0 for d in distances.values()]
    at_radius = sum(d.active_rows > 0 for d in distances.values())
    values = {
        "tether/largest_share": max(shares, default=0.0),
        "tether/median_share": statistics.median(shares) if shares else 0.0,
        "tether/layers_at_radius": at_radius / max(len(shares), 1),
    }
    if log == "layers":
        values |= {f"distance/{name}": distance.value for name, distance in distances.items()}
    return values


@torch.no_grad()
def measure_penalty(penalty: Penalty, log: Log) -> dict[str, float]:
    """What there is to report of a penalty: its value, which no rank knows where weights are sharded.

    Args:
        penalty: It.
        log: ``"layers"``: also the square root of every layer's share of an l2-SP of strength 1, its distance.
    """
    if log == "off" or any(is_sharded(layer.weight) for layer in penalty.layers):
        return {}
    values = {"tether/penalty": float(penalty())}
    if log == "layers":
        for layer in penalty.layers:
            share = float(penalty._share(layer))
            values[f"distance/{layer.name}"] = math.sqrt(share) if penalty.norm == "frobenius" else share
    return values
