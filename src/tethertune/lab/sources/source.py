"""What a data set is before anything is decoded: which images there are, of which classes, in which splits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tethertune.errors import DataError

__all__ = ["SPLIT_OF_WORD", "Source", "check_classes"]

SPLIT_OF_WORD = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}
"""What people call the splits, in the order in which these are listed."""


@dataclass(frozen=True)
class Source:
    """The images of one data set: which there are, and how to get the i-th.

    Attributes:
        name: What to call the data set.
        root: The folder that holds the files.
        files: Every file that images and labels are read from, relative to the root, with forward slashes, in a fixed
            order.
        classes: Names of the classes.
        labels: (n,) int64, the class of each image.
        splits: Images of the splits that the source tells apart: ``train``, and possibly ``validation`` and ``test``.
        image: The i-th image, in mode RGB.
        cropped: Whether the images show their object from edge to edge, so that nothing may be cut off.
        ignored: How many files were passed over: hidden ones, and those without the suffix of an image.
        split: How the splits were made, in a sentence without a full stop.
    """

    name: str
    root: Path
    files: tuple[str, ...]
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    splits: Mapping[str, NDArray[np.int64]]
    image: Callable[[int], Image.Image]
    cropped: bool = False
    ignored: int = 0
    split: str = "as the data comes"


def check_classes(
    data: object, classes: Sequence[str], labels: NDArray[np.int64], splits: Mapping[str, NDArray[np.int64]]
) -> None:
    """Every class has a training image.

    Raises:
        DataError: One has none, or there are fewer than two.
    """
    if len(classes) < 2:
        raise DataError(f"{data} has {len(classes)} classes; two or more are needed.")
    counts = np.bincount(labels[splits["train"]], minlength=len(classes))
    if not counts.all():
        raise DataError(
            f"class {classes[int(counts.argmin())]!r} of {data} has no training images; take the class out."
        )
