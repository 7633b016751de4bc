"""How much each channel of a feature map matters for a data set: what DELTA weighs its penalty with."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tethertune.features import channel_losses

__all__ = ["MOST_IMAGES", "importance"]

MOST_IMAGES = 2048
"""Images that are looked at, of larger training splits: the loss of leaving a channel out is a mean, known by then."""
_STEPS = 200
_BATCH = 256


def importance(
    network: nn.Module, layers: Sequence[str], examples: Iterable[tuple[Tensor, Tensor]], classes: int
) -> dict[str, Tensor]:
    """How much the loss of a linear classifier on a layer's features grows when one channel is left out.

    The features are the spatial means of the layer's map in the network as it is, which is left as it was; the
    classifier starts at zero and is trained on all of them at once by Adam, so that nothing is random.

    Args:
        network: The pre-trained network.
        layers: Names of modules whose output is (n, C), (n, tokens, C) or (n, C, height, width).
        examples: Images (b, 3, size, size) and labels (b,), on the network's device.
        classes: Number of classes.

    Returns:
        For each layer (C,) float64 on the CPU; see :func:`tethertune.features.channel_losses`.
    """
    features, labels = _features(network, layers, examples)
    return {name: _without_each(inputs, labels, classes).cpu() for name, inputs in features.items()}


@torch.no_grad()
def _features(
    network: nn.Module, layers: Sequence[str], examples: Iterable[tuple[Tensor, Tensor]]
) -> tuple[dict[str, Tensor], Tensor]:
    """The mean over positions of each layer's map, (n, C) float32; and the labels (n,)."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        means = output if output.ndim == 2 else output.mean(1) if output.ndim == 3 else output.mean((2, 3))
        found[name].append(means.float())

    hooks = [network.get_submodule(name).register_forward_hook(partial(keep, name)) for name in layers]
    labels: list[Tensor] = []
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        for images, targets in examples:
            network(images)
            labels.append(targets)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(labels)


def _without_each(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    linear = nn.Linear(features.shape[1], classes, device=features.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.01)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        functional.cross_entropy(linear(features), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    classifier = nn.Sequential(nn.Identity(), linear)
    batches = zip(torch.split(features, _BATCH), torch.split(labels, _BATCH), strict=True)
    return channel_losses(classifier, "0", batches, functional.cross_entropy, tail=linear)
