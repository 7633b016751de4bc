"""What a method of :mod:`tethertune.lab.methods` does to a run, behind one small interface."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from tethertune import rows
from tethertune.constraint import Constraint
from tethertune.errors import ConfigurationError
from tethertune.features import FeaturePenalty, attention_weights
from tethertune.lab import files
from tethertune.lab.attention import importance
from tethertune.lab.config import FinetuneConfig
from tethertune.lab.methods import METHODS, Method
from tethertune.lab.models import LoadedModel
from tethertune.penalty import Penalty
from tethertune.radii import Relative
from tethertune.reference import Reference

__all__ = ["Regulariser", "build"]


class Regulariser:
    """What holds the weights during a run; this one, of the method ``none``, holds nothing."""

    constraint: Constraint | None = None
    """The hard balls, where the method has them."""

    def attach(self, optimizer: Optimizer) -> None:
        """Hang what acts at each step on the optimiser."""

    def prepare(self, cache: Path | None, examples: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> None:
        """Look at the training images before the first step.

        Args:
            cache: A folder that keeps what was found for the case that the run is resumed; ``None``: do not write.
            examples: Batches of images and labels, on the model's device.
        """

    def loss(self, images: Tensor) -> Tensor | None:
        """What is added to the loss of the batch that has just passed through the model, 0-d, if anything."""

    def weight_penalty(self) -> Tensor | None:
        """The penalty on the weights as they are now, 0-d and differentiable, where its gradient is added directly."""

    def value(self) -> float:
        """The number that :meth:`weight_penalty` is."""
        penalty = self.weight_penalty()
        return 0.0 if penalty is None else penalty.item()

    def at_radius(self) -> float | None:
        """The share of constrained rows that are at their radius; ``None`` where nothing is constrained."""
        return None

    def frozen(self) -> list[nn.Parameter]:
        """Parameters of the body that stay as they are whatever their gradient, so that none need be computed."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What must be the same when a run is resumed: settings, and the fingerprint of the reference."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that a run is resumed around the same reference.

        Raises:
            ReferenceMismatchError: It is not.
        """


class Balls(Regulariser):
    """MARS-PGM and l2-PGM: a projection after each step."""

    def __init__(self, method: Method, config: FinetuneConfig, loaded: LoadedModel, reference: Reference) -> None:
        assert method.norm is not None
        radius = config.radius if config.relative_radius is None else Relative(config.relative_radius)
        assert radius is not None
        still = _still(config, loaded)
        self._model = loaded.model
        self.constraint: Constraint = Constraint(
            loaded.model,
            norm=method.norm,
            radius={**dict.fromkeys(still, 0.0), "*": radius} if still else radius,
            head=loaded.head,
            head_radius=config.head_radius,
            include=(*config.include, *still),
            exclude=config.exclude,
            affine=config.affine,
            head_bias=config.head_bias,
            convention=config.convention,
            projection=config.projection,
            reference=reference,
        )

    def attach(self, optimizer: Optimizer) -> None:
        """Project now and after each step."""
        self.constraint.attach(optimizer)

    def at_radius(self) -> float | None:
        """The share of constrained rows that are at their radius."""
        distances = self.constraint.distances().values()
        total = sum(distance.rows for distance in distances)
        return sum(distance.active_rows for distance in distances) / total if total else None

    def frozen(self) -> list[nn.Parameter]:
        """Parameters of the body in a ball of radius 0."""
        still = [name for name, ball in self.constraint.distances().items() if ball.role == "body" and ball.radius == 0]
        return [self._model.get_parameter(name) for name in still]

    def state_dict(self) -> dict[str, Any]:
        """The constraint's."""
        return self.constraint.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check the reference."""
        self.constraint.load_state_dict(state)


def _still(config: FinetuneConfig, loaded: LoadedModel) -> list[str]:
    """Names of the body's parameters that ``freeze`` holds, those of biases and normalisation layers among them.

    Raises:
        PatternError: A pattern that matches no parameter of the body.
        ConfigurationError: One that is left free at the same time.
    """
    layers = rows.layers(loaded.model, head=loaded.head, convention=config.convention)
    names = [name for layer in layers if layer.role == "body" for name in layer.names]
    still = rows.matching(names, config.freeze, "freeze")
    free = rows.matching([name for layer in layers for name in layer.names], config.exclude, "exclude") & still
    if free:
        raise ConfigurationError(f"{min(free)} is both in --freeze and in --exclude, which leaves it free: drop one.")
    return [name for name in names if name in still]


class WeightPenalty(Regulariser):
    """l2-SP and MARS-SP: a term on the weights, whose gradient is added before each step."""

    def __init__(self, method: Method, config: FinetuneConfig, loaded: LoadedModel, reference: Reference) -> None:
        assert method.norm is not None
        assert config.strength is not None
        self.penalty = Penalty(
            loaded.model,
            norm=method.norm,
            strength=config.strength,
            head=loaded.head,
            head_strength=config.head_strength or 0.0,
            include=config.include,
            exclude=config.exclude,
            convention=config.convention,
            reference=reference,
        )

    def attach(self, optimizer: Optimizer) -> None:
        """Add the gradient before each step."""
        self.penalty.attach(optimizer)

    def weight_penalty(self) -> Tensor:
        """The penalty on the weights as they are now."""
        return self.penalty()

    def state_dict(self) -> dict[str, Any]:
        """The penalty's."""
        return self.penalty.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check the reference."""
        self.penalty.load_state_dict(state)


class Delta(Regulariser):
    """DELTA: a term on the last feature map, weighed by each channel's importance for the training images."""

    def __init__(self, method: Method, config: FinetuneConfig, loaded: LoadedModel, reference: Reference) -> None:
        del method, reference  # it keeps a frozen copy of the whole network
        assert config.strength is not None
        if not loaded.feature_layers:
            raise ConfigurationError(f"{loaded.name} has no feature map before its head: --method delta needs one.")
        self._loaded = loaded
        self._attention = config.attention
        self.penalty = FeaturePenalty(
            loaded.model,
            layers=loaded.feature_layers,
            strength=config.strength,
            attention="none",  # until the training images are there
            head=loaded.head,
            head_strength=config.head_strength or 0.0,
        )

    def prepare(self, cache: Path | None, examples: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> None:
        """Find the channels' importance, and keep it in the cache."""
        if self._attention == "none":
            return
        kept = None if cache is None else cache / "delta-attention.safetensors"
        if kept is not None and kept.exists():
            losses = load_file(kept)
        else:
            classes = len(self._loaded.model.get_parameter(f"{self._loaded.head}.weight"))
            losses = importance(self._loaded.model, self._loaded.feature_layers, examples(), classes)
            if kept is not None:
                with files.atomic_path(kept) as temporary:
                    save_file(losses, temporary)
        self.penalty.attention = self._attention
        self.penalty.weights = {name: attention_weights(loss, self._attention) for name, loss in losses.items()}

    def loss(self, images: Tensor) -> Tensor | None:
        """The penalty on the maps of the batch that has just passed, and on the head."""
        return self.penalty(images)

    def state_dict(self) -> dict[str, Any]:
        """The penalty's."""
        return self.penalty.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check the reference, and take over the attention."""
        self.penalty.load_state_dict(state)


_BY_KIND = {"constraint": Balls, "penalty": WeightPenalty, "features": Delta}


def build(config: FinetuneConfig, loaded: LoadedModel, reference: Reference) -> Regulariser:
    """The regulariser of a configuration, for a model whose pre-trained weights are in place.

    Raises:
        PatternError: A name pattern of the configuration matches nothing.
        ConfigurationError: The method cannot be used with this model.
    """
    method = METHODS[config.method]
    if method.kind == "none":
        return Regulariser()
    return _BY_KIND[method.kind](method, config, loaded, reference)
