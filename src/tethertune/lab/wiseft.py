"""WiSE-FT: the straight line from the pre-trained weights to the trained ones (Wortsman et al. 2022, arXiv:2109.01903).

The networks on it trade what was learned for what was known. A ball around the pre-trained weights is convex and holds
both ends, so it holds all of them.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tethertune.constraint import Constraint

__all__ = ["GRID", "Line", "between", "largest"]

GRID = tuple(step / 20 for step in range(20, -1, -1))
"""The places on the line that :func:`largest` tries: 1, 0.95, ..., 0."""


def between(
    reference: Mapping[str, Tensor], trained: Mapping[str, Tensor], alpha: float, *, head: str
) -> dict[str, Tensor]:
    r"""The weights at a place on the line.

    .. math:: W_0 + \alpha (W - W_0)

    for every parameter of the body and for batch-norm statistics, computed in float64 and rounded once: each number
    lies between its two ends, so running variances stay positive and no distance grows. The new head, which has no
    pre-trained weights, stays as trained, and so do counters.

    Args:
        reference: The pre-trained weights W0 by name, on the CPU.
        trained: The trained weights W by the same names, on the CPU.
        alpha: From 0, the pre-trained body, to 1, the trained one.
        head: Name of the new head's module.

    Example:
        >>> w0, w = {"body.weight": torch.zeros(2)}, {"body.weight": torch.ones(2), "fc.weight": torch.ones(1)}
        >>> between(w0, w, 0.25, head="fc")
        {'body.weight': tensor([0.2500, 0.2500]), 'fc.weight': tensor([1.])}
    """
    return {
        name: tensor
        if name.startswith(f"{head}.") or not tensor.is_floating_point()
        else torch.lerp(reference[name].double(), tensor.double(), alpha).to(tensor.dtype)
        for name, tensor in trained.items()
    }


def largest(keeps: Callable[[float], bool]) -> float:
    """The largest alpha of :data:`GRID` that keeps what is to be kept; 0, the pre-trained body, keeps all.

    Args:
        keeps: Whether the network at a place on the line does.

    Example:
        >>> largest(lambda alpha: alpha < 0.5)
        0.45
    """
    return next(alpha for alpha in GRID if alpha == 0 or keeps(alpha))


class Line:
    """A network that can be put to any place between the pre-trained weights, which it has now, and trained ones.

    Args:
        network: The network. Its weights are copied to the CPU.
        head: Name of its new head's module.
        constraint: The balls that it is held in.
    """

    def __init__(self, network: nn.Module, *, head: str, constraint: Constraint | None = None) -> None:
        self._network, self._head, self._constraint = network, head, constraint
        self._reference = weights_of(network)

    def go(self, trained: Mapping[str, Tensor], alpha: float) -> None:
        """Give the network the weights :func:`between`, projected, so that no rounding leaves a ball.

        Args:
            trained: The trained weights by name, on the CPU.
            alpha: From 0 to 1.
        """
        self._network.load_state_dict(between(self._reference, trained, alpha, head=self._head))
        if self._constraint is not None:
            self._constraint.project()


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's state dict on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
