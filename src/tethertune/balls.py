"""One ball a layer: its centre and radius, brought into the dtype, device, layout and sharding of the weight."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tethertune import norms
from tethertune.errors import ConfigurationError
from tethertune.kernels.chunked import Chunked
from tethertune.reference import Reference, like
from tethertune.rows import Layer
from tethertune.sharding import full, local, refuse_split_rows, shard_like

__all__ = ["AUTHORS_EPSILON", "Ball", "Block", "make_ball", "reference_norm"]

AUTHORS_EPSILON = 1e-6
"""What the authors' code adds to a running variance, whatever the layer's own epsilon."""


@dataclass(frozen=True)
class Block:
    """Views of a weight and its centre whose axis 0 numbers the rows, ready for a kernel.

    Attributes:
        weight: The stored weights; writing to them changes the model.
        centre: Their reference.
        radius: Of each row, float64, (rows,).
        unit: What a distance of 1 measures in the stored weights, float64, (rows,); ``None`` for 1. A batch-norm
            scale under the authors' convention is measured in multiples of its standard deviation.
        shift: What a lossy reference takes off the radius, float64, (rows,); ``None`` for nothing.
    """

    weight: Tensor
    centre: Tensor
    radius: Tensor
    unit: Tensor | None = None
    shift: Tensor | None = None


@dataclass(eq=False)
class Ball:
    """The ball of one layer.

    Attributes:
        layer: Whose weights it holds.
        norm: ``"mars"`` or ``"frobenius"``.
        radius: gamma_j, finite, in the norm.
        centre: The reference, whole or sharded; ``None`` for the head's ball around 0.
        centre_variance: The reference running variance of a batch-norm scale under the authors' convention.
        shift: How far a lossy reference lies from the true one, in the norm: (rows,) for MARS, 0-d for Frobenius.
    """

    layer: Layer
    norm: str
    radius: float
    centre: Tensor | None
    centre_variance: Tensor | None = None
    shift: Tensor | None = None
    _prepared: tuple[object, Tensor, Tensor, Tensor | None] | None = field(default=None, repr=False)

    @property
    def by_row(self) -> bool:
        """Whether each row has a ball of its own: always in the MARS norm, and for a batch-norm scale."""
        return self.norm == "mars" or self.centre_variance is not None

    @property
    def room(self) -> float:
        """The radius of a Frobenius ball that is left around the centre as it is stored."""
        return self.radius if self.shift is None else self.radius - float(self.shift)

    def blocks(self, *, device: torch.device | None = None) -> list[Block]:
        """The weight as it is now, cut into blocks of rows; empty where this rank's shard is empty.

        Args:
            device: Where the centre is kept; ``None``: beside the weight.
        """
        weight = self.layer.weight
        W = local(weight).detach()
        if not W.numel():
            return []
        centre, radius, shift = self._prepare(weight, W, device or W.device)
        if self.centre_variance is not None:
            return [self._batch_norm_block(W, centre, radius)]
        cut = self.layer.rows.blocks
        rows = radius.chunk(self.layer.rows.groups)
        shifts = [None] * len(rows) if shift is None else shift.chunk(self.layer.rows.groups)
        return [Block(w, c, r, shift=s) for w, c, r, s in zip(cut(W), cut(centre), rows, shifts, strict=True)]

    def _prepare(self, weight: Tensor, W: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Centre, radius of each row and shift, local; made again only when the weight changes its form."""
        form = (id(weight), W.dtype, W.device, W.shape, W.stride())
        if self._prepared is None or self._prepared[0] != form:
            rows = self.layer.rows
            refuse_split_rows(
                weight,
                self.layer.name,
                axis_0=rows.axis == 0 and rows.groups == 1 and not (rows.single and self.by_row),
            )
            if self.centre is None:
                centre = torch.zeros((), dtype=W.dtype, device=W.device).expand(W.shape)
            else:
                centre = like(self.centre, weight, device)
            shift = None if self.shift is None else self.shift.expand(rows.shape(weight)[0])
            if shift is not None:
                shift = shard_like(shift.contiguous(), weight).to(W.device)
            radius = torch.full((rows.shape(W)[0],), self.radius, dtype=torch.float64, device=W.device)
            self._prepared = (form, centre, radius if shift is None else radius - shift, shift)
        return self._prepared[1:]

    def _batch_norm_block(self, W: Tensor, centre: Tensor, radius: Tensor) -> Block:
        """``|w / s - w0 / s0| <= radius`` as a ball around ``w0 s / s0`` with radius ``radius * s``."""
        variance = self.layer.module.running_var
        assert isinstance(variance, Tensor)
        assert self.centre_variance is not None
        deviation = (variance.double() + AUTHORS_EPSILON).sqrt()
        start = (self.centre_variance.to(W.device).double() + AUTHORS_EPSILON).sqrt()
        moved = centre.to(W.device).double() / start * deviation
        return Block(W.unsqueeze(1), moved.unsqueeze(1), radius * deviation, unit=deviation)

    def distances(self, kernel: Chunked) -> Tensor:
        """The distance of each local row (MARS) or the sum of squares of each local chunk (Frobenius), float64, 1-d."""
        blocks = self.blocks()
        if not self.by_row:
            return kernel.squares([(block.weight, block.centre) for block in blocks], exactly=True)
        parts = [torch.zeros(0, dtype=torch.float64, device=local(self.layer.weight).device)]
        for block in blocks:
            measured = kernel.distances(block.weight, block.centre)
            measured = measured if block.unit is None else measured / block.unit
            parts.append(measured if block.shift is None else measured + block.shift)
        return torch.cat(parts)


def make_ball(layer: Layer, norm: str, radius: float, reference: Reference, dtype: torch.dtype | None) -> Ball:
    """The ball around a layer's reference, with the reference stored in the given dtype.

    Raises:
        ConfigurationError: The centre, in the stored dtype or in the weight's, is further from the reference than the
            radius, so that there is no ball left.
    """
    true = reference[layer.name]
    variance = reference[layer.variance_name] if layer.rows.kind == "scale" else None
    stored = true if dtype is None else true.to(dtype)
    shift = None
    for what, rounded in (("reference_dtype", stored), ("the weights' dtype", stored.to(layer.weight.dtype))):
        distance = _distance(layer, norm, local(rounded), local(true))
        if bool((distance > radius).any()):
            raise ConfigurationError(
                f"{what}={rounded.dtype} moves the centre of {layer.name} by up to {float(distance.max()):.3g}, more"
                f" than its radius {radius:.3g}: keep the reference in {true.dtype}, or choose a larger radius."
            )
        if rounded is stored and bool(distance.any()):
            shift = distance
    return Ball(layer, norm, radius, stored, variance, shift)


def _distance(layer: Layer, norm: str, a: Tensor, b: Tensor) -> Tensor:
    """How far two versions of a layer lie apart: (rows,) for MARS, 0-d for Frobenius, float64."""
    if a.dtype == b.dtype or not a.numel():
        return torch.zeros((), dtype=torch.float64, device=a.device)
    T = layer.rows.matrix(a.double() - b.double())
    return norms.row_sums(T) if norm == "mars" else norms.frobenius(T)


def reference_norm(layer: Layer, norm: str, reference: Reference) -> float:
    """A layer's own norm, for radii relative to it.

    Raises:
        ConfigurationError: The reference is not finite.
    """
    weight = full(reference[layer.name]).detach()
    if layer.rows.kind == "scale":
        value = (weight.double() / (full(reference[layer.variance_name]).double() + AUTHORS_EPSILON).sqrt()).abs().max()
    else:
        matrix = layer.rows.matrix(weight)
        value = norms.mars(matrix) if norm == "mars" else norms.frobenius(matrix)
    if not value.isfinite():
        raise ConfigurationError(f"The reference of {layer.name} holds a NaN or an infinity: load it again.")
    return float(value)
