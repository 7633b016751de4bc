"""The gradient of the loss over all training images, the data's part and the penalty's part apart (Figure 1)."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tethertune.lab.regularisers import Regulariser

__all__ = ["gradient_norms"]


def gradient_norms(
    network: nn.Module,
    regulariser: Regulariser,
    examples: Iterable[tuple[Tensor, Tensor]],
    count: int,
    *,
    label_smoothing: float = 0.0,
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> dict[str, float]:
    r"""Norms of the mean gradient over the training images with respect to all trained weights.

    With :math:`w` all trained weights, :math:`\ell_i` the cross-entropy of image :math:`i`, :math:`P` the penalty,

    .. math:: \Big\|\frac1n\sum_i \nabla_w \ell_i\Big\|_2, \quad \|\nabla_w P\|_2, \quad
              \Big\|\frac1n\sum_i \nabla_w \ell_i + \nabla_w P\Big\|_2

    in eval mode: batch norm with its running statistics, no dropout (the paper's Figure 1, whose curves show the sum of
    both parts). The weights, their ``.grad`` and the mode of the network are left as they were.

    Args:
        network: The network, outside of any wrapper.
        regulariser: What adds a penalty to the loss of this network.
        examples: Batches of images and labels on the network's device: this process's share of all training images.
        count: How many training images there are, over all processes.
        label_smoothing: As in training.
        reduce: Sums a tensor over the processes.

    Returns:
        ``data_gradient``, ``penalty_gradient`` and ``full_gradient``.
    """
    weights = [parameter for parameter in network.parameters() if parameter.requires_grad]
    data, penalty = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    training = network.training
    network.eval()
    try:
        for images, labels in examples:
            loss = cross_entropy(network(images), labels, reduction="sum", label_smoothing=label_smoothing)
            of_features = regulariser.loss(images)
            _add_gradient(loss / count, weights, data)
            if of_features is not None:
                _add_gradient(of_features * (len(labels) / count), weights, penalty)
    finally:
        network.train(training)
    for total in (*data, *penalty):
        total.copy_(reduce(total))
    of_weights = regulariser.weight_penalty()
    if of_weights is not None:
        _add_gradient(of_weights, weights, penalty)
    parts = {"data_gradient": data, "penalty_gradient": penalty, "full_gradient": torch._foreach_add(data, penalty)}
    return {name: torch.nn.utils.get_total_norm(part).item() for name, part in parts.items()}


def _add_gradient(value: Tensor, weights: Sequence[Tensor], totals: Sequence[Tensor]) -> None:
    gradients = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
    for total, gradient in zip(totals, gradients, strict=True):
        if gradient is not None:
            total.add_(gradient)
