"""How far a network has moved: every layer's distance from a reference in both norms, without a constraint."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tethertune import norms, rows
from tethertune.reference import Reference, Source
from tethertune.rows import Convention, Role, Rows
from tethertune.sharding import full

__all__ = ["Displacement", "distances", "of_matrices"]


@dataclass(frozen=True)
class Displacement:
    """How far one layer's weights are from its reference, and how large the reference is, all in float64.

    Attributes:
        mars: The largest row l1 norm of W - W0.
        frobenius: The Frobenius norm of W - W0.
        reference_mars: The MARS norm of W0; 0 for the head, whose centre is 0.
        reference_frobenius: The Frobenius norm of W0; 0 for the head.
        rows: The number of rows.
        columns: The number of weights in a row.
        role: ``"body"`` or ``"head"``.
    """

    mars: float
    frobenius: float
    reference_mars: float
    reference_frobenius: float
    rows: int
    columns: int
    role: Role


@torch.no_grad()
def distances(
    model: nn.Module, reference: Source, *, head: str | None = None, convention: Convention = "operator"
) -> dict[str, Displacement]:
    """The distance of every linear map of a model (no biases, no normalisation) from its reference, by name.

    Args:
        model: The network.
        reference: The weights to measure from: a reference, state dict, module or safetensors path.
        head: The head's module name or pattern: its distance is measured from 0.
        convention: ``"operator"`` or ``"authors"``; see :mod:`tethertune.rows`.

    Raises:
        ReferenceMismatchError: The reference is of another network.

    Example:
        >>> before = nn.Linear(2, 1, bias=False)
        >>> after = nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = after.weight.copy_(before.weight + torch.tensor([[3.0, -4.0]]))
        >>> moved = distances(after, before)["weight"]
        >>> round(moved.mars, 5), round(moved.frobenius, 5)
        (7.0, 5.0)
    """
    layers = [layer for layer in rows.layers(model, head=head, convention=convention) if layer.rows.kind == "map"]
    weights = Reference.load(reference, [layer for layer in layers if layer.role == "body"])
    result = {}
    for layer in layers:
        weight = full(layer.weight).detach()
        centre = full(weights[layer.name]).to(weight.device) if layer.role == "body" else torch.zeros_like(weight)
        result[layer.name] = of_matrices(weight, centre, layer.rows, layer.role)
    return result


def of_matrices(weight: Tensor, centre: Tensor, cut: Rows, role: Role = "body") -> Displacement:
    """The displacement of one weight from its centre, cut into rows in the given way."""
    T = cut.matrix(weight.double() - centre.double())
    W0 = cut.matrix(centre)
    count, columns = cut.shape(weight)
    values = torch.stack([norms.mars(T), norms.frobenius(T), norms.mars(W0), norms.frobenius(W0)])
    mars, frobenius, reference_mars, reference_frobenius = values.tolist()
    return Displacement(mars, frobenius, reference_mars, reference_frobenius, count, columns, role)
