"""Images and labels of a data set, split and decoded: what a run trains and tests on."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tethertune.errors import ConfigurationError
from tethertune.lab import cache as image_cache
from tethertune.lab import images, sources, splits

__all__ = ["Dataset", "Split", "load"]


@dataclass(frozen=True)
class Split:
    """The images of one of train, validation and test: a selection, of which only batches are ever copied.

    Attributes:
        store: (m, size, size, 3) uint8, the decoded images of the whole data set, memory-mapped.
        members: (n,) int64, which of them belong to the split.
        labels: (n,) int64, the class of each member.
    """

    store: NDArray[np.uint8]
    members: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.members)

    def batch(self, indices: Tensor) -> Tensor:
        """Copy the images of a batch: (b, 3, size, size) uint8, channels last in memory.

        Args:
            indices: (b,) int64 on the CPU, each from 0 to ``len(split) - 1``, as :func:`~.batches.batches` gives them.
        """
        pixels = np.asarray(self.store[self.members[indices.numpy()]])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Dataset:
    """A data set, ready to train on.

    Attributes:
        name: ``fashion``, or the name of the folder.
        classes: Names of the classes; a label is a position among them.
        train: What weights are fitted to.
        validation: What settings are chosen by.
        test: What results are reported on.
        fingerprint: ``"sha256:..."`` of the names and contents of the files.
        ignored: Number of files in the folder that are hidden or no images.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    fingerprint: str
    ignored: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images in each split."""
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}


def load(
    data: str,
    *,
    size: int,
    interpolation: str = "bilinear",
    crop_fraction: float = 0.875,
    per_class: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
) -> Dataset:
    """Find, split and decode the images of a data set.

    Args:
        data: ``"fashion"``, the embedded images; a folder with ``train/ val/ test/`` of class folders; or a folder of
            class folders. A split that is missing is held out of the training images: 15 % of each class.
        size: Side of the decoded images in pixels.
        interpolation: How pixels are interpolated: ``"bilinear"``, ``"bicubic"``, ``"nearest"``, ...
        crop_fraction: Images from a folder are resized so that the central square with this share of the shorter side
            has the given size, and cut to it, as timm does for evaluation. Embedded images are resized whole.
        per_class: Training images to keep of each class; None keeps all.
        seed: Decides which images are held out, and which ``per_class`` keeps.
        cache: Folder of decoded images; None is ``$XDG_CACHE_HOME/tethertune``.

    Raises:
        ConfigurationError: A number or name is not allowed, or ``per_class`` is more than some class has.
        DataError: The folder, a class or an image cannot be used, or the cache cannot be written.
    """
    _check(size, interpolation, crop_fraction)
    source = sources.find(data)
    members = splits.complete(source.splits, source.labels, source.classes, seed)
    members["train"] = splits.subset(members["train"], source.labels, source.classes, per_class, seed)
    folder = Path(cache) if cache else image_cache.default_folder()
    fingerprint = image_cache.fingerprint(source, folder)
    store = image_cache.decoded(
        source,
        fingerprint,
        size=size,
        interpolation=interpolation,
        crop_fraction=None if source.cropped else crop_fraction,
        cache=folder,
    )
    return Dataset(
        name=source.name,
        classes=source.classes,
        fingerprint=fingerprint,
        ignored=source.ignored,
        **{split: Split(store, chosen, source.labels[chosen]) for split, chosen in members.items()},
    )


def _check(size: int, interpolation: str, crop_fraction: float) -> None:
    if size < 1:
        raise ConfigurationError(f"size = {size}; give the side of the images in pixels, 1 or more.")
    if not 0 < crop_fraction <= 1:
        raise ConfigurationError(f"crop_fraction = {crop_fraction}; give a share above 0, at most 1.")
    images.resampling(interpolation)
