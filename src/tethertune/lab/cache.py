"""Decoded images on disk, memory-mapped: every run of one size shares them, whatever its seed and subset.

::

    <cache>/fingerprints/<key>   the fingerprint of a source; key: its path, and its files' names, sizes and times
    <cache>/images/<key>         its images; key: fingerprint, size, interpolation, crop, version of Pillow

A file of images is raw uint8 (n, size, size, 3) followed by the CRC-32 of it. Files appear under their name only when
they are whole, so any number of processes may share a cache; one that is damaged later is noticed and made again.
"""

import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray

from tethertune.errors import DataError
from tethertune.lab.files import atomic_path, write_text
from tethertune.lab.images import fit, resampling
from tethertune.lab.sources import Source

__all__ = ["decoded", "default_folder", "fingerprint"]

_FORMAT = 1
"""Goes up when the same files are decoded to other pixels, or stored otherwise."""
_CHECKSUM_BYTES = 4
_BLOCK = 256
"""Images decoded at once: what bounds the memory while a cache is written."""

_logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/tethertune``, or ``~/.cache/tethertune``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tethertune"


def fingerprint(source: Source, cache: Path) -> str:
    """``"sha256:..."`` of the names and contents of the source's files.

    Contents are read again only if the name, size or time of some file changed.

    Raises:
        DataError: A file of the source cannot be read, or the cache cannot be written.
    """
    remembered = cache / "fingerprints" / _key(str(source.root.resolve()), *_signatures(source))
    try:
        known = remembered.read_text(encoding="ascii", errors="replace") if remembered.exists() else ""
        if not re.fullmatch("sha256:[0-9a-f]{64}", known):
            known = _hash(source)
            write_text(remembered, known)
    except OSError as error:
        raise _unusable(cache, error) from error
    return known


def decoded(
    source: Source, fingerprint: str, *, size: int, interpolation: str, crop_fraction: float | None, cache: Path
) -> NDArray[np.uint8]:
    """The source's images, (n, size, size, 3), read-only and memory-mapped; decoded now if they are not in the cache.

    Raises:
        DataError: An image cannot be used, or the cache cannot be written.
    """
    path = cache / "images" / _key(_FORMAT, PIL.__version__, fingerprint, size, interpolation, crop_fraction)
    shape = (len(source.labels), size, size, 3)
    try:
        images = _open(path, shape)
        if images is None:
            _logger.info("decoding %d images into %s", shape[0], path)
            _write(path, _decode(source, size, interpolation, crop_fraction))
            images = _open(path, shape)
    except OSError as error:
        raise _unusable(cache, error) from error
    if images is None:
        raise DataError(f"the image cache {path} differs from what was just written to it: check the disk.")
    return images


def _open(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """Map a file of images; None if there is none or it is damaged."""
    if not path.exists():
        return None
    if path.stat().st_size == np.prod(shape) + _CHECKSUM_BYTES:
        stored = np.memmap(path, np.uint8, mode="r")
        images, checksum = stored[:-_CHECKSUM_BYTES], stored[-_CHECKSUM_BYTES:]
        if zlib.crc32(images.data) == int.from_bytes(checksum.tobytes(), "little"):
            return images.reshape(shape)
    _logger.warning("%s is damaged; making it again", path)
    return None


def _write(path: Path, images: Iterator[NDArray[np.uint8]]) -> None:
    checksum = 0
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for image in images:
            file.write(image.data)
            checksum = zlib.crc32(image.data, checksum)
        file.write(checksum.to_bytes(_CHECKSUM_BYTES, "little"))


def _decode(source: Source, size: int, interpolation: str, crop_fraction: float | None) -> Iterator[NDArray[np.uint8]]:
    filter_ = resampling(interpolation)

    def image(index: int) -> NDArray[np.uint8]:
        return fit(source.image(index), size, filter_, crop_fraction)

    indices = range(len(source.labels))
    with ThreadPoolExecutor() as pool:
        for start in indices[::_BLOCK]:
            yield from pool.map(image, indices[start : start + _BLOCK])


def _hash(source: Source) -> str:
    """SHA-256 over each file's name, a zero byte, and the SHA-256 of its contents."""

    def digest(name: str) -> bytes:
        try:
            with (source.root / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise DataError(f"cannot read {source.root / name}: {error.strerror}.") from error

    total = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for name, contents in zip(source.files, pool.map(digest, source.files), strict=True):
            total.update(os.fsencode(name) + b"\0" + contents)
    return f"sha256:{total.hexdigest()}"


def _signatures(source: Source) -> Iterator[tuple[str, int, int, int]]:
    """What changes when a file does. The change time too: the modification time can be set back."""
    for name in source.files:
        try:
            status = (source.root / name).stat()
        except OSError as error:
            raise DataError(f"cannot read {source.root / name}: {error.strerror}.") from error
        yield name, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _unusable(cache: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot keep decoded images in {cache}: {error.strerror}. "
        "Name a folder with --cache that can be written and has room."
    )
