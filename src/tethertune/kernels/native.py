"""The C kernels for weights on a CPU: a table of blocks, and one call a step that brings all of them inside.

What they do to a row is what :mod:`tethertune.kernels.chunked` does, in one pass: a row is measured, and while it is
still in the cache scaled if it is outside. See ``c/row.inc`` for the arithmetic and ``docs/exactness.md`` for why it
holds.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch

from tethertune.kernels import library
from tethertune.kernels.stretches import Stretches

__all__ = ["Block", "Table", "supports"]

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ZERO = 3
_PROJECTIONS = {"radial": 0, "euclidean": 1}


class Block(ctypes.Structure):
    """``struct block`` of ``c/ball.h``."""

    _fields_ = (
        ("w", ctypes.c_void_p),
        ("c", ctypes.c_void_p),
        ("radius", ctypes.c_void_p),
        ("size", ctypes.c_double),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("w_step", ctypes.c_int64),
        ("c_step", ctypes.c_int64),
        ("w_type", ctypes.c_int32),
        ("c_type", ctypes.c_int32),
        ("outside", ctypes.c_int64),
        ("broken", ctypes.c_int64),
    )

    @classmethod
    def of(cls, rows: Stretches) -> "Block":
        """The addresses of tensors that must be kept as long as the block is used."""
        W, centre = rows.weight, rows.centre
        return cls(
            w=W.data_ptr(),
            c=None if centre is None else centre.data_ptr(),
            radius=rows.radius.data_ptr(),
            size=rows.size,
            rows=W.shape[0],
            columns=W.shape[1],
            w_step=W.stride(0),
            c_step=0 if centre is None else centre.stride(0),
            w_type=_TYPES[W.dtype],
            c_type=_ZERO if centre is None else _TYPES[centre.dtype],
        )


def supports(rows: Stretches) -> bool:
    """Whether a :class:`Table` can hold them: weights, centre and radius on the CPU, in 16 or 32 bits."""
    tensors = [rows.weight] if rows.centre is None else [rows.weight, rows.centre]
    return all(t.device.type == "cpu" and t.dtype in _TYPES for t in tensors) and rows.radius.device.type == "cpu"


class Table:
    """Everything that the kernels need of the weights of a constraint, as long as these stay where they are.

    Args:
        rows: What is to be held; see :func:`supports`.
        norm: ``"mars"``: a ball for every row. ``"frobenius"``: one for each of ``rows``.
        projection: ``"radial"`` or ``"euclidean"``, for the rows of the MARS ball.
    """

    def __init__(self, rows: Sequence[Stretches], norm: str, projection: str = "radial") -> None:
        self._rows = tuple(rows)  # keeps the memory
        self.blocks = (Block * len(rows))(*map(Block.of, rows))
        self._project = functools.partial(_function(norm), self.blocks, len(rows))
        if norm == "mars":
            self._project = functools.partial(self._project, _PROJECTIONS[projection])

    @property
    def nbytes(self) -> int:
        """The bytes of the table, without the tensors that it is of."""
        return ctypes.sizeof(self.blocks)

    def project(self) -> int:
        """Bring every row or layer inside; returns how many are not finite and were left as they are."""
        broken: int = self._project(torch.get_num_threads())
        if broken < 0:
            raise MemoryError("no memory for the sums of the layers' pieces")
        return broken


@functools.cache
def _function(norm: str) -> Callable[..., int]:
    library_ = library.load()
    function = library_.tethertune_rows if norm == "mars" else library_.tethertune_frobenius
    function.restype = ctypes.c_int64
    numbers = [ctypes.c_int64, ctypes.c_int, ctypes.c_int] if norm == "mars" else [ctypes.c_int64, ctypes.c_int]
    function.argtypes = [ctypes.POINTER(Block), *numbers]
    return function
