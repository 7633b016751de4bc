"""Data sets in the four files that MNIST and Fashion-MNIST are published as."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tethertune.errors import DataError
from tethertune.lab import idx
from tethertune.lab.sources.source import Source

__all__ = ["mnist"]

_PREFIX_OF_SPLIT = {"train": "train", "test": "t10k"}
"""What the names of the files of a split begin with where images come as in MNIST."""


def mnist(root: Path) -> Source:
    """The images in files named as those of MNIST and Fashion-MNIST, compressed or not.

    ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, and the same with ``t10k`` for the test images, which may
    be absent. Classes are called by their numbers.

    Raises:
        DataError: A file is missing, cannot be read or holds something else; images and labels differ in number; a
            class has no image.
    """
    files: list[str] = []
    splits: dict[str, NDArray[np.int64]] = {}
    pixels: list[NDArray[np.uint8]] = []
    labels: list[NDArray[np.uint8]] = []
    count = 0
    for split, prefix in _PREFIX_OF_SPLIT.items():
        if split == "test" and idx.locate(root, f"{prefix}-images-idx3-ubyte") is None:
            continue
        for values, name, axes in ((pixels, "images-idx3", 3), (labels, "labels-idx1", 1)):
            path = idx.locate(root, f"{prefix}-{name}-ubyte")
            if path is None:
                raise DataError(f"{root} has no {prefix}-{name}-ubyte, compressed (.gz) or not: it is one of the set.")
            files.append(path.name)
            values.append(idx.read(path, axes))
        if len(pixels[-1]) != len(labels[-1]) or pixels[-1].size == 0:
            raise DataError(f"{root} has {len(pixels[-1])} {split} images and {len(labels[-1])} labels of them.")
        splits[split] = np.arange(count, count + len(labels[-1]))
        count += len(labels[-1])
    classes = int(max(of_split.max() for of_split in labels)) + 1
    for of_split in labels:
        if (missing := np.setdiff1d(np.arange(classes), of_split)).size:
            raise DataError(f"class {missing[0]} of {root} is not in every split; each needs images of all classes.")
    starts = np.cumsum([0, *(len(part) for part in pixels)])

    def image(index: int) -> Image.Image:
        part = int(np.searchsorted(starts, index, side="right")) - 1
        return Image.fromarray(pixels[part][index - starts[part]]).convert("RGB")

    return Source(
        name=root.resolve().name,
        root=root,
        files=tuple(files),
        classes=tuple(map(str, range(classes))),
        labels=np.concatenate(labels).astype(np.int64),
        splits=splits,
        image=image,
        cropped=True,
    )
