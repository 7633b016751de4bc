"""Pre-trained networks with a new head in place: what a fine-tuning run starts from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tethertune.errors import CheckpointError, ConfigurationError
from tethertune.lab import architectures, checkpoints
from tethertune.lab.architectures import Architecture, Preprocessing, WeightsFile

__all__ = ["HeadKind", "LoadedModel", "assemble", "load", "original"]

HeadKind = Literal["pool", "flatten"]
"""The new head: ``"pool"``, a zero-initialised linear layer on the pooled features; or ``"flatten"``, a linear layer
with Glorot-uniform weights on the whole last feature map, as in the code published with the paper."""


@dataclass(frozen=True)
class LoadedModel:
    """A network that is ready to be fine-tuned, and what must be known to do it right.

    Attributes:
        model: The network, float32, on the CPU, with pre-trained weights and the new head.
        name: Its architecture: a timm name, ``torchvision:NAME`` or ``lite0``.
        source: Where the weights are from: a package, a repository, a URL or a path; ``"random"`` without any.
        weights_sha256: SHA-256 of the weights file in hexadecimal; ``None`` without one.
        head: Name of the new head's module.
        feature_layers: Names of the modules whose outputs a feature penalty compares by default: the last feature map.
        mean: Per channel, subtracted from values in [0, 1].
        std: Per channel, divided by afterwards.
        size: Side of the images in pixels.
        interpolation: How images are resized, e.g. ``"bicubic"``.
        crop: Share of the resized side that the central crop keeps when the network is evaluated, in (0, 1].
    """

    model: nn.Module
    name: str
    source: str
    weights_sha256: str | None
    head: str
    feature_layers: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: int
    interpolation: str
    crop: float


def load(
    name: str,
    *,
    classes: int,
    size: int | None = None,
    head: HeadKind = "pool",
    weights: str | Path | None = None,
    pretrained: bool = True,
    seed: int = 0,
) -> LoadedModel:
    """A pre-trained network with a new head.

    Args:
        name: A timm name, ``torchvision:NAME``, ``lite0``, or the path of a checkpoint that says which network it is
            of: a tethertune run, or a folder that timm saved.
        classes: Outputs of the new head, 2 or more.
        size: Side of the images in pixels; ``None`` for the network's own.
        head: See :data:`HeadKind`.
        weights: A checkpoint of the network that ``name`` names, used in place of its published weights.
        pretrained: Load weights; ``False``: leave them random.
        seed: Seed of everything random, which leaves torch's own generator alone.

    Raises:
        ConfigurationError: An unknown name, a size that the network does not take, or a head that it cannot have.
        CheckpointError: The weights cannot be read or downloaded, or are of another network.
        MissingExtraError: The package with the weights is not installed.

    Example:
        >>> loaded = load("resnet10t", classes=3, size=64, pretrained=False)
        >>> loaded.head, loaded.feature_layers, loaded.size
        ('fc', ('layer4',), 64)
    """
    if head not in get_args(HeadKind):
        raise ConfigurationError(f"head={head!r} is not known: use {' or '.join(get_args(HeadKind))}.")
    architecture, file = _resolve(name, weights)
    if file is None and pretrained:
        file = architecture.published()
    state = checkpoints.load_state_dict(file.path) if file else None
    wanted = architecture.preprocessing()
    size = size or wanted.size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = architecture.build(classes, size, state)
        except CheckpointError as error:
            raise CheckpointError(f"{weights or name}: {error} Name the network that they are of.") from error
    head_name = architecture.head(model)
    visits = _visits(model, head_name, size, architecture.name)
    if head == "pool":
        for parameter in model.get_submodule(head_name).parameters():
            nn.init.zeros_(parameter)
    else:
        features = _flatten(model, head_name, _pooling(visits), size, architecture.name)
        model.set_submodule(head_name, _glorot(features, classes, seed))
    return LoadedModel(
        model=model,
        name=architecture.name,
        source=file.source if file else "random",
        weights_sha256=checkpoints.sha256(file.path) if file else None,
        head=head_name,
        feature_layers=_last_map(visits),
        mean=wanted.mean,
        std=wanted.std,
        size=size,
        interpolation=wanted.interpolation,
        crop=wanted.crop,
    )


def original(
    name: str, *, size: int | None = None, weights: str | Path | None = None
) -> tuple[nn.Module, Preprocessing]:
    """A pre-trained network as it was before fine-tuning: with the classifier that it was trained with.

    Args:
        name: As in :func:`load`.
        size: Side of the images in pixels; ``None`` for the network's own.
        weights: As in :func:`load`.

    Returns:
        The network in eval mode, which needs no gradient; and how it wants its images, at that size.

    Raises:
        ConfigurationError: An unknown name, or a size that the network does not take.
        CheckpointError: The weights cannot be read, are of another network, or come without their classifier.
        MissingExtraError: The package with the weights is not installed.

    Example:
        >>> model, wanted = original("lite0", size=64)
        >>> model.classifier.out_features, wanted.size
        (1000, 64)
    """
    architecture, file = _resolve(name, weights)
    file = file or architecture.published()
    state = architecture.native(checkpoints.load_state_dict(file.path))
    head = architecture.head(architecture.skeleton(classes=1))
    if f"{head}.weight" not in state:
        raise CheckpointError(
            f"{file.source} holds no classifier ({head}.weight), so what the network answered before cannot be told:"
            " give weights with their classifier, or leave --retain out."
        )
    wanted = architecture.preprocessing()
    wanted = replace(wanted, size=size or wanted.size)
    model = architecture.build(len(state[f"{head}.weight"]), wanted.size, state)
    own = model.get_submodule(head).state_dict()
    given = {key: state[f"{head}.{key}"] for key in own if f"{head}.{key}" in state}
    if fault := checkpoints.difference(given, own):
        raise CheckpointError(
            f"{file.source} has another classifier than {architecture.name} was made with ({fault}), so what the"
            " network answered before cannot be told: give other weights, or leave --retain out."
        )
    model.get_submodule(head).load_state_dict(given)
    _visits(model, head, wanted.size, architecture.name)
    return model.eval().requires_grad_(requires_grad=False), wanted


def assemble(name: str, state: Mapping[str, Tensor], *, size: int | None = None) -> tuple[nn.Module, str]:
    """The modules of a network around the tensors of a checkpoint, whatever head it has, without copying them.

    Only the types of the modules and their parameters are as in the real network: buffers that checkpoints leave out
    stay on the meta device, so it cannot be run.

    Args:
        name: Architecture of the network.
        state: Its complete state dict.
        size: Side of the images that the checkpoint was trained on, for networks whose shapes depend on it.

    Returns:
        The network, and the name of its classifier.

    Raises:
        CheckpointError: The state dict is of another network.
        ConfigurationError: An unknown name.
    """
    architecture = architectures.find(name)
    state = architecture.native(state)
    model = architecture.skeleton(classes=1, size=size)
    head = architecture.head(model)
    if f"{head}.weight" in state:
        outputs, inputs, *kernel = state[f"{head}.weight"].shape
        with torch.device("meta"):
            bias = f"{head}.bias" in state
            own = nn.Conv2d(inputs, outputs, 1, bias=bias) if kernel else nn.Linear(inputs, outputs, bias)
        model.set_submodule(head, own)
    fault = checkpoints.difference(state, model.state_dict())
    if fault:
        raise CheckpointError(f"The checkpoint is not of {name}: {fault}.")
    model.load_state_dict(state, assign=True)
    return model, head


def _resolve(name: str, weights: str | Path | None) -> tuple[Architecture, WeightsFile | None]:
    """The architecture, and the file that the user named for its weights."""
    if weights is not None:
        return architectures.find(name), WeightsFile(checkpoints.locate(weights), str(weights))
    if architectures.is_known(name) or not Path(name).exists():
        return architectures.find(name), None
    base = checkpoints.base_model(name)
    if base is None:
        raise ConfigurationError(
            f"{name} does not say which network it is of: give the network's name as the model, and this file with"
            f" --weights {name}."
        )
    return architectures.find(base), WeightsFile(checkpoints.locate(name), name)


@dataclass(frozen=True)
class _Visit:
    """A module that one image has passed on its way to the classifier, and the shape that it left with."""

    path: str
    module: nn.Module
    shape: torch.Size


def _visits(model: nn.Module, head: str, size: int, name: str) -> list[_Visit]:
    """What an image passes before the classifier, in the order of leaving."""
    visits: list[_Visit] = []
    hooks = []
    for path, module in model.named_modules():

        def leave(module: nn.Module, _: object, output: object, path: str = path) -> None:
            if isinstance(output, Tensor):
                visits.append(_Visit(path, module, output.shape))

        hooks.append(module.register_forward_hook(leave))
    try:
        _run(model, size)
    except Exception as error:  # each network fails in its own way on a size that it was not made for
        raise ConfigurationError(
            f"size={size}: {name} does not take images of that size ({error}); choose another, or leave it out."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return visits[: [visit.path for visit in visits].index(head)]


def _pooling(visits: list[_Visit]) -> _Visit | None:
    """The module that pools the last feature map to one value a channel, if a module does."""
    return next((visit for visit in reversed(visits) if _pools_to_one(visit.module)), None)


def _pools_to_one(module: nn.Module) -> bool:
    from timm.layers import SelectAdaptivePool2d

    return isinstance(module, SelectAdaptivePool2d) or (
        isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)) and module.output_size in (1, (1, 1))
    )


def _last_map(visits: list[_Visit]) -> tuple[str, ...]:
    """The name of the module that the last feature map, or sequence of tokens, comes from; empty if there is none."""
    pool = _pooling(visits)
    if pool:
        visits = [visit for visit in visits[: visits.index(pool)] if not visit.path.startswith(f"{pool.path}.")]
    return tuple(visit.path for visit in visits if len(visit.shape) > 2)[-1:]


@torch.no_grad()
def _run(model: nn.Module, size: int) -> Tensor:
    """What the network gives for one black image, in eval mode; the mode is restored."""
    training = model.training
    model.eval()
    try:
        output: Tensor = model(torch.zeros(1, 3, size, size))
    finally:
        model.train(training)
    return output


def _flatten(model: nn.Module, head: str, pool: _Visit | None, size: int, name: str) -> int:
    """Take the pooling and the classifier out; returns how many values the network then gives for an image."""
    refusal = f"head='flatten' needs a network that pools one feature map and classifies it, and {name} does not"
    if pool is None:
        raise ConfigurationError(f"{refusal}: use head='pool'.")
    flat = len(pool.shape) == 2 or isinstance(model.get_submodule(head), nn.Conv2d)
    model.set_submodule(pool.path, nn.Flatten(1) if flat else nn.Identity())
    model.set_submodule(head, nn.Identity())
    try:
        _, features = _run(model, size).shape
    except (RuntimeError, ValueError) as error:
        raise ConfigurationError(f"{refusal} ({error}): use head='pool'.") from error
    return features


def _glorot(features: int, classes: int, seed: int) -> nn.Linear:
    linear = nn.Linear(features, classes, device="meta").to_empty(device="cpu")
    nn.init.xavier_uniform_(linear.weight, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(linear.bias)
    return linear
