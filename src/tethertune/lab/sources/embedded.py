"""Data sets that come inside a package: a part of Fashion-MNIST in this one."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tethertune.lab.sources.source import Source

__all__ = ["fashion"]

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
    splits: dict[str, NDArray[np.int64]] = {}
    tiles: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for split in ("train", "validation", "test"):
        of_split, of_class = _tiles(_FASHION / f"{split}.png")
        splits[split] = np.arange(len(tiles), len(tiles) + len(of_split))
        tiles.extend(of_split)
        labels.extend(of_class)
    return Source(
        name="fashion",
        root=_FASHION,
        files=tuple(f"{split}.png" for split in splits),
        classes=_FASHION_CLASSES,
        labels=np.array(labels),
        splits=splits,
        image=lambda index: Image.fromarray(tiles[index]).convert("RGB"),
        cropped=True,
    )


def _tiles(mosaic: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The 28x28 images of a mosaic with a row of images for each class, as (n, 28, 28), and the class of each."""
    with Image.open(mosaic) as image:
        pixels = np.asarray(image)
    tiles = pixels.reshape(len(_FASHION_CLASSES), 28, -1, 28).transpose(0, 2, 1, 3)
    return tiles.reshape(-1, 28, 28), np.repeat(np.arange(tiles.shape[0]), tiles.shape[1])
