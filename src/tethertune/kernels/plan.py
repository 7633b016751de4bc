"""What a step needs to know of all layers together, found out once, and a cheap check that it still holds."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter

from tethertune.errors import ConfigurationError
from tethertune.kernels import backend, native
from tethertune.kernels.stretches import Stretches
from tethertune.rows import Layer
from tethertune.sharding import local

__all__ = ["Plan"]

_Form: TypeAlias = tuple[int, torch.dtype, torch.Size, tuple[int, ...], bool]


class Plan:
    """The weights that kernels take in one call a device, and the layers that are left to the chunked path.

    Args:
        layers: Every constrained layer; a plan no longer holds once the weight of one moves or changes its form.
        rows: Of each layer, what is to be projected: stretches of memory, nothing (an empty list), or ``None`` for
            what only the chunked path can do.
        norm: ``"mars"`` or ``"frobenius"``.
        projection: ``"radial"`` or ``"euclidean"``.

    Attributes:
        backend: The name of what runs, see :mod:`tethertune.kernels.backend`; ``"chunked"`` if no layer suits kernels.
        rest: The numbers of the layers that the kernels do not take.

    Raises:
        ConfigurationError: ``TETHERTUNE_BACKEND`` forces kernels that cannot run, or that suit none of the layers.
    """

    def __init__(
        self, layers: Sequence[Layer], rows: Sequence[Sequence[Stretches] | None], norm: str, projection: str
    ) -> None:
        self._seen = [(layer, _form(layer.weight)) for layer in layers]
        self.rest: list[int] = []
        taken: dict[tuple[str, torch.device], list[Stretches]] = {}
        for number, (layer, stretches) in enumerate(zip(layers, rows, strict=True)):
            if stretches is not None and not stretches:
                continue
            device = local(layer.weight).device
            name = backend.choose(device)
            if stretches and all(_suits(name, each, norm, projection) for each in stretches):
                taken.setdefault((name, device), []).extend(stretches)
            else:
                self.rest.append(number)
        self._tables = [_table(name, found, norm, projection) for (name, _), found in taken.items()]
        names = {name for name, _ in taken}
        self.backend = "+".join(sorted(names)) or "chunked"
        if self.rest and backend.forced() not in {None, "chunked", *names}:
            raise ConfigurationError(
                f"TETHERTUNE_BACKEND={backend.forced()} suits none of the layers: it takes float32, bfloat16 and"
                " float16 weights beside their references, whose rows have no gaps. Unset it."
            )

    @property
    def nbytes(self) -> int:
        """The bytes of the tables, without the tensors that they are of."""
        return sum(table.nbytes for table in self._tables)

    def project(self, broken: dict[torch.device, Tensor]) -> None:
        """Bring inside what the kernels take.

        Args:
            broken: How many rows or layers have been found that are not finite, by device: what is found is added.
        """
        for table in self._tables:
            table.project(broken)

    def holds(self) -> bool:
        """Whether every weight is where and what it was."""
        for layer, form in self._seen:  # the body of _form once more: a call would take a third of the time
            weight = layer.weight
            W = weight if type(weight) is Parameter else local(weight)
            if (W.data_ptr(), W.dtype, W.shape, W.stride(), weight.requires_grad) != form:
                return False
        return True


def _form(weight: Tensor) -> _Form:
    W = weight if type(weight) is Parameter else local(weight)
    return (W.data_ptr(), W.dtype, W.shape, W.stride(), weight.requires_grad)


class _Native:
    """A table on the CPU; its kernels say at once what they have found."""

    def __init__(self, rows: Sequence[Stretches], norm: str, projection: str) -> None:
        self._table = native.Table(rows, norm, projection)
        self.nbytes = self._table.nbytes

    def project(self, broken: dict[torch.device, Tensor]) -> None:
        count = self._table.project()
        if count:
            cpu = torch.device("cpu")
            broken[cpu] = torch.tensor(count) + broken.get(cpu, 0)


class _Triton:
    """A table on a CUDA device; its kernels count there, so that nothing waits for them."""

    def __init__(self, rows: Sequence[Stretches], norm: str) -> None:
        from tethertune.kernels import triton

        make, self._launch = (
            (triton.mars_table, triton.mars) if norm == "mars" else (triton.frobenius_table, triton.frobenius)
        )
        self._table = make(rows)
        parts = (self._table.blocks, self._table.squares, *self._table.jobs.values())
        self.nbytes = sum(part.nbytes for part in parts)

    def project(self, broken: dict[torch.device, Tensor]) -> None:
        device = self._table.blocks.device
        if device not in broken:
            broken[device] = torch.zeros((), dtype=torch.int64, device=device)
        self._launch(self._table, broken[device])


def _table(name: str, rows: Sequence[Stretches], norm: str, projection: str) -> _Native | _Triton:
    return _Native(rows, norm, projection) if name == "native" else _Triton(rows, norm)


def _suits(name: str, rows: Stretches, norm: str, projection: str) -> bool:
    """Whether the kernels of a backend can take these rows."""
    if name == "native":
        return native.supports(rows)
    if name == "triton":
        from tethertune.kernels import triton

        radial = norm == "frobenius" or projection == "radial"
        return radial and triton.supports(rows, by_row=norm == "mars")
    return False
