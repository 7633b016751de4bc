"""Where images come from: the data set that a user names, before anything is decoded."""

from pathlib import Path

from tethertune.errors import DataError, did_you_mean
from tethertune.lab import idx
from tethertune.lab.sources import published
from tethertune.lab.sources.embedded import digits, fashion
from tethertune.lab.sources.folders import folder, unlabelled
from tethertune.lab.sources.mnist import mnist
from tethertune.lab.sources.published import PUBLISHED
from tethertune.lab.sources.source import Source

__all__ = ["PUBLISHED", "Source", "digits", "fashion", "find", "folder", "mnist", "unlabelled"]

_EMBEDDED = {"fashion": fashion, "digits": digits}


def find(data: str) -> Source:
    """The source that a user names.

    Args:
        data: ``"fashion"`` or ``"digits"``, which are embedded; a name of :data:`PUBLISHED`, or ``"NAME:FOLDER"`` for
            where it lies; or the path of a folder.

    Raises:
        DataError: There is no such folder, or its images cannot be used; see :func:`folder`, :func:`mnist` and
            :func:`published.find`.
    """
    if data in _EMBEDDED:
        return _EMBEDDED[data]()
    name, colon, place = data.partition(":")
    if name in PUBLISHED:
        return published.find(name, Path(place) if colon else None)
    root = Path(data)
    if not root.is_dir():
        names = [*_EMBEDDED, *PUBLISHED]
        raise DataError(
            f"data = {data!r} is not a folder; give a folder of images or one of {', '.join(names)}."
            f"{did_you_mean(name, names)}"
        )
    return mnist(root) if idx.locate(root, "train-images-idx3-ubyte") else folder(root)
