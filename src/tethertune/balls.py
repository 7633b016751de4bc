"""One ball a layer: its centre and radius, brought into the dtype, device, layout and sharding of the weight."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tethertune import norms
from tethertune.errors import ConfigurationError
from tethertune.kernels.chunked import Chunked
from tethertune.kernels.stretches import Stretches, as_stretches
from tethertune.reference import Reference, stretches
from tethertune.rows import Layer, Rows
from tethertune.sharding import full, is_sharded, local, refuse_split_rows, shard_like

__all__ = ["AUTHORS_EPSILON", "Ball", "Block", "distance_between", "make_ball", "reference_norm"]

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
        reference: What holds its centre; ``None`` for the head's ball around 0.
        size: The norm of the centre.
        centre_variance: The reference running variance of a batch-norm scale under the authors' convention.
        shift: How far a lossy reference lies from the true one, in the norm: (rows,) for MARS, 0-d for Frobenius.
    """

    layer: Layer
    norm: str
    radius: float
    reference: Reference | None
    size: float = 0.0
    centre_variance: Tensor | None = None
    shift: Tensor | None = None
    _prepared: tuple[object, Tensor, Tensor, Tensor | None] | None = field(default=None, repr=False)

    @property
    def by_row(self) -> bool:
        """Whether each row has a ball of its own: always in the MARS norm, and for a batch-norm scale."""
        return self.norm == "mars" or self.centre_variance is not None

    @property
    def _rows(self) -> Rows:
        """How the weight is cut for the kernel; where rows do not matter, along axis 0, however it is sharded."""
        return self.layer.rows if self.by_row else Rows("other")

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
        cut = self._rows.blocks
        radii = radius.chunk(self._rows.groups)
        shifts = [None] * len(radii) if shift is None else shift.chunk(self._rows.groups)
        return [Block(w, c, r, shift=s) for w, c, r, s in zip(cut(W), cut(centre), radii, shifts, strict=True)]

    def in_memory(self, *, device: torch.device | None = None) -> list[Stretches] | None:
        """The weight as it is now, as what kernels hold on to from step to step; ``None`` where they cannot.

        They can where rows are stretches of memory, a Frobenius ball is not shared out among ranks, and radius and
        centre stay: those of a batch-norm scale under the authors' convention move with the running variance.

        Args:
            device: Where the centre is kept; ``None``: beside the weight.
        """
        if self.centre_variance is not None or (not self.by_row and is_sharded(self.layer.weight)):
            return None
        blocks = self.blocks(device=device)
        found = [as_stretches(b.weight, b.centre, b.radius, size=self.size, by_row=self.by_row) for b in blocks]
        whole = [rows for rows in found if rows is not None]
        return whole if len(whole) == len(blocks) else None

    def _prepare(self, weight: Tensor, W: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Centre, radius of each row and shift, local; made again only when the weight changes its form."""
        form = (id(weight), W.dtype, W.device, W.shape, W.stride())
        if self._prepared is None or self._prepared[0] != form:
            rows = self._rows
            if self.by_row:
                axis_0 = rows.axis == 0 and rows.groups == 1 and not rows.single
                refuse_split_rows(weight, self.layer.name, axis_0=axis_0)
            if self.reference is None:
                centre = torch.zeros((), dtype=W.dtype, device=W.device).expand(W.shape)
            else:
                centre = self.reference.beside(self.layer, device)
            shift = None if self.shift is None else self.shift.expand(rows.shape(weight)[0])
            if shift is not None:
                shift = shard_like(shift.contiguous(), weight).to(W.device)
            radius = torch.full((rows.shape(W)[0],), self.radius, dtype=torch.float64, device=W.device)
            self._prepared = (form, centre, radius if shift is None else radius - shift, shift)
        return self._prepared[1:]

    @property
    def nbytes(self) -> int:
        """The bytes of what it knows of its rows."""
        known = [self.shift, self.centre_variance, *(self._prepared[2:] if self._prepared else ())]
        return sum({t.data_ptr(): t.nbytes for t in known if t is not None}.values())

    def _batch_norm_block(self, W: Tensor, centre: Tensor, radius: Tensor) -> Block:
        """``|w / s - w0 / s0| <= radius`` as a ball around ``w0 s / s0`` with radius ``radius * s``."""
        variance = self.layer.module.running_var
        assert isinstance(variance, Tensor)
        assert self.centre_variance is not None
        deviation, start = (
            (shard_like(v.to(W.device), self.layer.weight).double() + AUTHORS_EPSILON).sqrt()
            for v in (variance, self.centre_variance)
        )
        moved = centre.to(W.device).double() * (deviation / start)
        return Block(W.unsqueeze(1), moved.unsqueeze(1), radius * deviation, unit=deviation)

    def distances(self, kernel: Chunked, *, device: torch.device | None = None) -> Tensor:
        """The distance of each local row (MARS) or the sum of squares of each local chunk (Frobenius), float64, 1-d.

        Args:
            kernel: What measures them.
            device: Where the centre is kept; ``None``: beside the weight.
        """
        blocks = self.blocks(device=device)
        if not self.by_row:
            return kernel.squares([(block.weight, block.centre) for block in blocks], exactly=True)
        parts = [torch.zeros(0, dtype=torch.float64, device=local(self.layer.weight).device)]
        for block in blocks:
            measured = kernel.distances(block.weight, block.centre)
            measured = measured if block.unit is None else measured / block.unit
            parts.append(measured if block.shift is None else measured + block.shift)
        return torch.cat(parts)


def make_ball(layer: Layer, norm: str, radius: float, size: float, shift: Tensor, reference: Reference) -> Ball:
    """The ball around a layer's reference.

    Args:
        layer: Whose weights it is for.
        norm: ``"mars"`` or ``"frobenius"``.
        radius: gamma_j.
        size: The norm of the true reference.
        shift: How far the stored reference lies from the true one; see :func:`distance_between`.
        reference: The stored reference.

    Raises:
        ConfigurationError: The centre, in the stored dtype or in the weight's, is further from the true reference than
            the radius, so that there is no ball left.
    """
    stored, dtype = reference.stored(layer.name), layer.weight.dtype
    floor = distance_between(layer, norm, stored, dtype).to(shift.device)
    for what, rounded, moved in (
        ("reference_dtype", stored.dtype, shift),
        ("the weights' dtype", dtype, shift + floor),
    ):
        if bool((moved > radius).any()):
            raise ConfigurationError(
                f"{what}={rounded} moves the centre of {layer.name} by up to {float(moved.max()):.3g}, more than its"
                f" radius {radius:.3g}: keep the reference and the weights in wider dtypes, or choose a larger radius."
            )
    variance = reference[layer.variance_name] if layer.rows.kind == "scale" else None
    size += float(shift.max())
    return Ball(layer, norm, radius, reference, size, variance, shift if bool(shift.any()) else None)


def distance_between(layer: Layer, norm: str, centre: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a layer's centre is moved by rounding to a dtype: (rows,) for MARS, else 0-d, 0 if exact; float64."""
    if torch.promote_types(centre.dtype, dtype) == dtype or not centre.numel():
        return torch.zeros((), dtype=torch.float64, device=centre.device)
    moved = (matrix.to(dtype).double() - matrix for matrix in _matrices(layer, full(centre)))
    if norm == "mars":
        return torch.cat([norms.row_sums(T) for T in moved])
    return _root_of_squares(moved)


def reference_norm(layer: Layer, norm: str, reference: Reference) -> float:
    """A layer's own norm, for radii relative to it; the same bits in whatever dtype the reference is stored.

    Raises:
        ConfigurationError: The reference is not finite.
    """
    weight = full(reference.stored(layer.name)).detach()
    if layer.rows.kind == "scale":
        variance = full(reference.stored(layer.variance_name)).double()
        value = (weight.double() / (variance + AUTHORS_EPSILON).sqrt()).abs().max()
    elif not weight.numel():
        return 0.0
    elif norm == "mars":
        value = torch.stack([norms.mars(matrix) for matrix in _matrices(layer, weight)]).amax()
    else:
        value = _root_of_squares(_matrices(layer, weight))
    if not value.isfinite():
        raise ConfigurationError(f"The reference of {layer.name} holds a NaN or an infinity: load it again.")
    return float(value)


def _matrices(layer: Layer, weight: Tensor) -> Iterator[Tensor]:
    """The rows of a layer's weight in float64, some at a time, in order."""
    for block in layer.rows.blocks(weight):
        for part in stretches(block):
            yield part.double().reshape(len(part), -1)


def _root_of_squares(matrices: Iterable[Tensor]) -> Tensor:
    return torch.stack([norms.add_up_rows(matrix.square()).sum() for matrix in matrices]).sum().sqrt()
