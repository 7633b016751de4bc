"""The (sub)gradients of penalties, added in place: cache-sized chunks, one scratch, no copy of a weight.

l2-SP reads the weights, the reference and the gradient once and writes the gradient once. MARS-SP reads the weights
and the reference once, and writes one row of each layer's gradient.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tethertune.kernels.chunked import Chunked, Parts, gapless_rows

__all__ = ["Gradients"]

_CPU_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 24
_NEAR = 1 - 2.0**-14  # of the largest row's distance; the error of a first look is a quarter of the difference to 1


class Gradients:
    """Adds the gradients of distances to stored ones, with a scratch of the size of a chunk that is kept."""

    def __init__(self) -> None:
        self._measure = Chunked()
        self._scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def add_displacement(
        self, gradient: Tensor, W: Tensor, centre: Tensor, factor: float, scale: Tensor | None = None
    ) -> None:
        r"""Add :math:`\text{factor} \cdot \text{scale} \cdot (W - c)`: half of it is the gradient of a square.

        The difference is taken in float32, or in float64 where the weights are.

        Args:
            gradient: What is added to, in place; of the weights' shape, of any floating dtype.
            W: The weights.
            centre: Their reference, beside them.
            factor: Known to the host.
            scale: 0-d, known to the device alone; ``None`` for 1.
        """
        for g, w, c in _pieces(gradient, W, centre):
            T = self._difference(w, c)
            if scale is not None:
                T.mul_(scale)
            g.add_(T, alpha=factor)

    def add_sign_of_largest_row(
        self, gradients: Sequence[Tensor], parts: Parts, factor: float, scale: Tensor | None = None
    ) -> None:
        r"""Add :math:`\text{factor} \cdot \text{scale} \cdot \operatorname{sign}(t)` to the row of the largest l1 norm.

        :math:`t` is that row's displacement. Of several equally large rows one is taken.

        Args:
            gradients: What is added to, in place, in the blocks of ``parts``.
            parts: A layer as blocks of weights and reference whose axis 0 numbers the rows, all of the same length.
            factor: Known to the host.
            scale: 0-d, known to the device alone; ``None`` for 1.
        """
        largest = self._largest_row(parts)
        for k, (gradient, (W, centre)) in enumerate(zip(gradients, parts, strict=True)):
            row = (largest - k * len(W)).reshape(1)
            here = (row >= 0) & (row < len(W))
            row = row.clamp(0, len(W) - 1)
            sign = _wide_difference(W.index_select(0, row), centre.index_select(0, row)).sign()
            sign *= here.view(-1, *[1] * (sign.ndim - 1))
            gradient.index_add_(0, row, (sign if scale is None else sign * scale).to(gradient.dtype), alpha=factor)

    def _largest_row(self, parts: Parts) -> Tensor:
        """The number of the row with the largest l1 distance, counted through all blocks: int64, 0-d.

        On a CPU the host looks at the rows that a first measurement in float32 cannot tell apart, and measures them in
        float64; on an accelerator, where a look would stall, all are.
        """
        on_cpu = parts[0][0].device.type == "cpu"
        sums = torch.cat([self._measure.distances(W, centre, exactly=not on_cpu) for W, centre in parts])
        largest = sums.argmax()
        if not on_cpu:
            return largest
        near = (sums >= sums[largest] * _NEAR).nonzero().squeeze(1)
        if len(near) <= 1 or not sums[largest]:  # one, or a NaN, or nothing has moved
            return largest
        rows = len(parts[0][0])
        exactly = [
            self._measure.distances(W[rest], centre[rest])
            for k, (W, centre) in enumerate(parts)
            for rest in [near[near // rows == k] - k * rows]
        ]
        return near[torch.cat(exactly).argmax()]

    def _difference(self, W: Tensor, centre: Tensor) -> Tensor:
        """``W - centre`` in the scratch, in float32 or wider."""
        dtype = torch.promote_types(W.dtype, torch.float32)
        held = self._scratch.get((dtype, W.device))
        if held is None or held.numel() < W.numel():
            held = self._scratch[dtype, W.device] = torch.empty(W.numel(), dtype=dtype, device=W.device)
        out = held[: W.numel()].view(W.shape)
        return torch.sub(W, centre, out=out) if W.dtype == dtype else out.copy_(W).sub_(centre)


def _wide_difference(W: Tensor, centre: Tensor) -> Tensor:
    dtype = torch.promote_types(W.dtype, torch.float32)
    return W.to(dtype) - centre.to(dtype)


def _pieces(gradient: Tensor, W: Tensor, centre: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chunks of the three: stretches of memory where they lie in the same order without gaps, else along axis 0."""
    size = _CPU_CHUNK if W.device.type == "cpu" else _DEVICE_CHUNK
    constant = not any(centre.stride())  # the head's centre is one zero, expanded
    same_order = gradient.stride() == W.stride() and (constant or centre.stride() == W.stride())
    if same_order and gapless_rows(W.unsqueeze(0), W.numel()):
        gradient, W = (t.as_strided((t.numel(),), (1,)) for t in (gradient, W))
        centre = centre.as_strided(W.shape, (0 if constant else 1,))
    step = max(1, size * len(W) // max(W.numel(), 1))
    for start in range(0, len(W), step):
        end = start + step
        yield gradient[start:end], W[start:end], centre[start:end]
