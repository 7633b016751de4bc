"""What a step needs to know of all layers together, found out once, and a cheap check that it still holds."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from tethertune.errors import ConfigurationError
from tethertune.kernels import backend, native
from tethertune.kernels.stretches import Stretches
from tethertune.rows import Layer
from tethertune.sharding import local

__all__ = ["Plan"]

_Form: TypeAlias = tuple[int, torch.dtype, torch.Size, tuple[int, ...], bool]


class Plan:
    """The weights that kernels take in one call, and the layers that are left to the chunked path.

    Args:
        layers: Every constrained layer; a plan no longer holds once the weight of one moves or changes its form.
        rows: Of each layer, what is to be projected: stretches of memory, nothing (an empty list), or ``None`` for
            what only the chunked path can do.
        norm: ``"mars"`` or ``"frobenius"``.
        projection: ``"radial"`` or ``"euclidean"``.

    Attributes:
        backend: The name of what runs, see :mod:`tethertune.kernels.backend`; ``"chunked"`` if no layer suits kernels.
        table: What the kernels take; ``None`` for nothing.
        rest: The numbers of the layers that the table does not hold.

    Raises:
        ConfigurationError: ``TETHERTUNE_BACKEND`` forces kernels that cannot run, or that suit none of the layers.
    """

    def __init__(
        self, layers: Sequence[Layer], rows: Sequence[Sequence[Stretches] | None], norm: str, projection: str
    ) -> None:
        self._seen = [(layer, _form(layer.weight)) for layer in layers]
        self.rest: list[int] = []
        taken: list[Stretches] = []
        names = set()
        for number, (layer, stretches) in enumerate(zip(layers, rows, strict=True)):
            if stretches is not None and not stretches:
                continue
            name = backend.choose(layer.weight.device)
            if name == "native" and stretches and all(map(native.supports, stretches)):
                taken.extend(stretches)
                names.add(name)
            else:
                self.rest.append(number)
        self.table = native.Table(taken, norm, projection) if taken else None
        self.backend = "+".join(sorted(names)) or "chunked"
        if self.rest and backend.forced() not in {None, "chunked", *names}:
            raise ConfigurationError(
                f"TETHERTUNE_BACKEND={backend.forced()} suits none of the layers: it takes float32, bfloat16 and"
                " float16 weights and references beside each other, whose rows have no gaps. Unset it."
            )

    def project(self) -> int:
        """Bring inside what the table holds; returns how many rows or layers are not finite."""
        return self.table.project() if self.table else 0

    def holds(self) -> bool:
        """Whether every weight is where and what it was."""
        return all(_form(layer.weight) == form for layer, form in self._seen)


def _form(weight: Tensor) -> _Form:
    W = weight if type(weight) is torch.nn.Parameter else local(weight)
    return (W.data_ptr(), W.dtype, W.shape, W.stride(), weight.requires_grad)
