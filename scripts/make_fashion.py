"""Make the images that tethertune carries from Debian's package ``dataset-fashion-mnist``.

Usage: ``python scripts/make_fashion.py [SOURCE [TARGET]]``

Each split becomes one greyscale PNG, a mosaic of 28x28 images: row ``c`` holds the images of class ``c`` in the order
of Fashion-MNIST. Training and validation images are the first 60 of each class of its training set, test images the
first 200 of each class of its test set. Nothing is drawn at random, so the same input gives the same files.
"""

import gzip
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SOURCE = Path("/usr/share/datasets/fashion-mnist")
TARGET = Path(__file__).parent.parent / "src/tethertune/lab/assets/fashion"
SPLITS = {
    "train": ("train", slice(0, 20)),
    "validation": ("train", slice(20, 60)),
    "test": ("t10k", slice(0, 200)),
}
"""For each split, the set of Fashion-MNIST it is taken from, and which images of each class."""
CLASSES = 10
SIDE = 28


def read(source: Path, name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The images (n, 28, 28) and labels (n,) of one set, from gzipped IDX files with headers of 16 and 8 bytes."""
    images = np.frombuffer(gzip.decompress((source / f"{name}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((source / f"{name}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return images.reshape(-1, SIDE, SIDE), labels


def mosaic(images: NDArray[np.uint8], labels: NDArray[np.uint8], taken: slice) -> NDArray[np.uint8]:
    """The taken images of each class side by side, one class below the other: (10 * 28, n * 28)."""
    chosen = np.stack([images[labels == label][taken] for label in range(CLASSES)])
    return chosen.transpose(0, 2, 1, 3).reshape(CLASSES * SIDE, -1)


def main(source: Path = SOURCE, target: Path = TARGET) -> None:
    """Write ``train.png``, ``validation.png`` and ``test.png`` into the target folder."""
    for split, (name, taken) in SPLITS.items():
        path = target / f"{split}.png"
        Image.fromarray(mosaic(*read(source, name), taken)).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
