"""Where images come from: the data set that a user names, before anything is decoded."""

from pathlib import Path

from tethertune.errors import DataError, did_you_mean
from tethertune.lab import idx
from tethertune.lab.sources.embedded import digits, fashion
from tethertune.lab.sources.folders import folder, unlabelled
from tethertune.lab.sources.mnist import mnist
from tethertune.lab.sources.source import Source

__all__ = ["Source", "digits", "fashion", "find", "folder", "mnist", "unlabelled"]

_EMBEDDED = {"fashion": fashion, "digits": digits}


def find(data: str) -> Source:
    """The source that a user names: ``"fashion"``, ``"digits"``, or the path of a folder.

    Raises:
        DataError: There is no such folder, or its images cannot be used; see :func:`folder` and :func:`mnist`.
    """
    if data in _EMBEDDED:
        return _EMBEDDED[data]()
    root = Path(data)
    if not root.is_dir():
        raise DataError(
            f"data = {data!r} is not a folder; give {', '.join(map(repr, _EMBEDDED))} or a folder of images."
            f"{did_you_mean(data, _EMBEDDED)}"
        )
    return mnist(root) if idx.locate(root, "train-images-idx3-ubyte") else folder(root)
