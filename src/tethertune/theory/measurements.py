"""Distances of every layer of any network: numbers to rank layers by, where no bound is proven for the network."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from tethertune import rows
from tethertune.errors import ReferenceMismatchError
from tethertune.theory.sample import tensors

__all__ = ["LayerMeasurement", "measurements"]


@dataclass(frozen=True)
class LayerMeasurement:
    """One weight of a linear map, batch norm not folded in; no guarantee follows from these numbers.

    Attributes:
        name: The weight.
        reference: MARS norm of the reference's rows.
        distance: MARS distance from the reference.
        reference_frobenius: Frobenius norm of the reference's weight.
        frobenius: Frobenius distance.
        share: ``(D / B) / sum (D / B)`` with ``B = reference + distance``.
    """

    name: str
    reference: float
    distance: float
    reference_frobenius: float
    frobenius: float
    share: float


def measurements(
    model: nn.Module, *, reference: Mapping[str, Tensor] | nn.Module, head: str | None = None
) -> tuple[LayerMeasurement, ...]:
    """Measure every linear map of the body of any network, in float64.

    Args:
        model: The trained network.
        reference: The pre-trained weights by name, or the pre-trained network.
        head: Name of the new head, which is left out.

    Raises:
        ReferenceMismatchError: The reference lacks a weight, or has one of another shape.
    """
    pretrained = tensors(reference) if isinstance(reference, nn.Module) else reference
    found: list[LayerMeasurement] = []
    for layer in rows.layers(model, head=head):
        if layer.rows.kind != "map" or layer.role == "head":
            continue
        weight = layer.weight.detach()
        other = pretrained.get(layer.name)
        if other is None or other.shape != weight.shape:
            raise ReferenceMismatchError(
                f"The reference has no {layer.name} of shape {tuple(weight.shape)}: it is of another network."
            )
        matrix0 = layer.rows.matrix(other.detach().to(weight.device).double())
        moved = layer.rows.matrix(weight.double()) - matrix0
        base, distance = (float(m.abs().sum(1).max()) for m in (matrix0, moved))
        ratio = distance / (base + distance) if distance else 0.0
        found.append(LayerMeasurement(layer.name, base, distance, float(matrix0.norm()), float(moved.norm()), ratio))
    total = sum(layer.share for layer in found) or 1.0
    return tuple(replace(layer, share=layer.share / total) for layer in found)
