"""Files in the idx format, in which MNIST, Fashion-MNIST and their relatives are published."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tethertune.errors import DataError

__all__ = ["locate", "read"]

_UINT8 = 0x08


def locate(root: Path, name: str) -> Path | None:
    """The file of a name in a folder, compressed (``.gz``) or not; ``None`` if there is neither."""
    return next((path for path in (root / f"{name}.gz", root / name) if path.is_file()), None)


def read(path: Path, axes: int) -> NDArray[np.uint8]:
    """The array of bytes in an idx file, read-only.

    The format: two zero bytes, a byte for the type, a byte for the number of axes, the length of each axis as a
    big-endian 32-bit integer, and the values, last axis fastest.

    Args:
        path: The file; it is taken for gzip if its name ends in ``.gz``.
        axes: Axes that the array must have.

    Raises:
        DataError: The file cannot be read, is cut off or damaged, or holds something else.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot use {path}: {error}. Fetch the file again.") from error
    start = 4 + 4 * axes
    if content[:4] != bytes((0, 0, _UINT8, axes)) or len(content) < start:
        raise DataError(f"{path} is no idx file of bytes with {axes} axes: fetch the file again, or take it away.")
    shape = tuple(int(length) for length in np.frombuffer(content, ">u4", axes, offset=4))
    if len(content) != start + math.prod(shape):
        raise DataError(
            f"{path} says it holds {math.prod(shape)} values and holds {len(content) - start}: fetch the file again."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
