"""Data sets that come inside a package: a part of Fashion-MNIST in this one, handwritten digits in scikit-learn."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tethertune.errors import MissingExtraError
from tethertune.lab import splits
from tethertune.lab.sources.source import Source

__all__ = ["digits", "fashion"]

_FASHION = Path(__file__).parents[1] / "assets" / "fashion"
_FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def fashion() -> Source:
    """The embedded 20 training, 40 validation and 200 test images of each of the ten classes of Fashion-MNIST."""
    members: dict[str, NDArray[np.int64]] = {}
    tiles: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for split in ("train", "validation", "test"):
        of_split, of_class = _tiles(_FASHION / f"{split}.png")
        members[split] = np.arange(len(tiles), len(tiles) + len(of_split))
        tiles.extend(of_split)
        labels.extend(of_class)
    return Source(
        name="fashion",
        root=_FASHION,
        files=tuple(f"{split}.png" for split in members),
        classes=_FASHION_CLASSES,
        labels=np.array(labels),
        splits=members,
        image=lambda index: Image.fromarray(tiles[index]).convert("RGB"),
        cropped=True,
    )


def digits() -> Source:
    """The 1,797 handwritten digits of 8 x 8 pixels that scikit-learn carries: a test set of the UCI repository.

    50 images of each class are for validation (500) and 70 for testing (700), the same in every run; the other 597, 54
    to 63 of a class, are for training.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    if not find_spec("sklearn"):
        raise MissingExtraError("digits needs the package scikit-learn: pip install 'tethertune[lab]'.")
    from sklearn import datasets

    content = datasets.load_digits()
    pixels = np.rint(content.images * (255 / 16)).astype(np.uint8)
    labels = content.target.astype(np.int64)
    return Source(
        name="digits",
        root=Path(datasets.__file__).parent / "data",
        files=("digits.csv.gz",),
        classes=tuple(map(str, range(10))),
        labels=labels,
        splits=splits.by_class(labels, {"validation": 50, "test": 70}, "train", seed=0),
        image=lambda index: Image.fromarray(pixels[index]).convert("RGB"),
        cropped=True,
        split="drawn with seed 0: 50 validation and 70 test images of each class, the rest for training",
    )


def _tiles(mosaic: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The 28x28 images of a mosaic with a row of images for each class, as (n, 28, 28), and the class of each."""
    with Image.open(mosaic) as image:
        pixels = np.asarray(image)
    tiles = pixels.reshape(len(_FASHION_CLASSES), 28, -1, 28).transpose(0, 2, 1, 3)
    return tiles.reshape(-1, 28, 28), np.repeat(np.arange(tiles.shape[0]), tiles.shape[1])
