"""Where images come from: the data set that a user names, before anything is decoded."""

from pathlib import Path

from tethertune.errors import DataError, did_you_mean
from tethertune.lab import idx
from tethertune.lab.sources.embedded import fashion
from tethertune.lab.sources.folders import folder, unlabelled
from tethertune.lab.sources.mnist import mnist
from tethertune.lab.sources.source import Source

__all__ = ["Source", "fashion", "find", "folder", "mnist", "unlabelled"]


def find(data: str) -> Source:
    """The source that a user names: ``"fashion"`` or the path of a folder.

    Raises:
        DataError: There is no such folder, or its images cannot be used; see :func:`folder` and :func:`mnist`.
    """
    if data == "fashion":
        return fashion()
    if not Path(data).is_dir():
        raise DataError(
            f"data = {data!r} is not a folder; give 'fashion' or a folder of images.{did_you_mean(data, ['fashion'])}"
        )
    root = Path(data)
    return mnist(root) if idx.locate(root, "train-images-idx3-ubyte") else folder(root)
