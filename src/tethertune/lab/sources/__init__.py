"""Where images come from: the data set that a user names, before anything is decoded."""

from pathlib import Path

from tethertune.errors import DataError, did_you_mean
from tethertune.lab import idx
from tethertune.lab.sources import published
from tethertune.lab.sources.embedded import digits, fashion
from tethertune.lab.sources.folders import folder, unlabelled
from tethertune.lab.sources.hub import hub
from tethertune.lab.sources.mnist import mnist
from tethertune.lab.sources.published import PUBLISHED
from tethertune.lab.sources.shards import locate, shards
from tethertune.lab.sources.source import Source

__all__ = ["PUBLISHED", "Source", "digits", "fashion", "find", "folder", "hub", "mnist", "shards", "unlabelled"]

_EMBEDDED = {"fashion": fashion, "digits": digits}


def find(data: str) -> Source:
    """The source that a user names.

    Args:
        data: ``"fashion"`` or ``"digits"``, which are embedded; a name of :data:`PUBLISHED`, or ``"NAME:FOLDER"`` for
            where it lies; ``"hf:..."``, see :func:`hub`; or the path of a folder, which is read by :func:`mnist`,
            :func:`shards` or :func:`folder`, whichever fits.

    Raises:
        DataError: There is no such folder, or its images cannot be used; see the functions.
        MissingExtraError: What reads it is not installed.
    """
    if data in _EMBEDDED:
        return _EMBEDDED[data]()
    name, colon, place = data.partition(":")
    if name == "hf" and place:
        return hub(place)
    if name in PUBLISHED:
        return published.find(name, Path(place) if colon else None)
    root = Path(data)
    if not root.is_dir():
        names = [*_EMBEDDED, *PUBLISHED]
        raise DataError(
            f"data = {data!r} is not a folder; give a folder of images, hf:NAME, or one of {', '.join(names)}."
            f"{did_you_mean(name, names)}"
        )
    if idx.locate(root, "train-images-idx3-ubyte"):
        return mnist(root)
    return shards(root) if locate(root) else folder(root)
