"""Images and labels of a data set, split and decoded: what a run trains and tests on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tethertune.errors import ConfigurationError
from tethertune.lab import cache as image_cache
from tethertune.lab import images, sources, splits
from tethertune.lab.sources import Source

__all__ = ["Dataset", "Resize", "Split", "TrainOn", "check", "how_split", "load"]

Resize = Literal["crop", "stretch"]
"""How photos become square: ``"crop"`` cuts the centre out, ``"stretch"`` keeps everything and loses the shape."""
TrainOn = Literal["train", "train+validation"]
"""Which images weights are fitted to."""


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
        name: ``fashion`` or another name of a data set, or the name of the folder.
        classes: Names of the classes; a label is a position among them.
        train: What weights are fitted to.
        validation: What settings are chosen by.
        test: What results are reported on.
        fingerprint: ``"sha256:..."`` of the names and contents of the files.
        ignored: Number of files in the folder that are hidden or no images.
        split: How the splits were made, in a sentence without a full stop.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    fingerprint: str
    ignored: int = 0
    split: str = "as the data comes"

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images in each split."""
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}


def load(
    data: str | Source,
    *,
    size: int,
    interpolation: str = "bilinear",
    crop_fraction: float = 0.875,
    resize: Resize = "crop",
    train_on: TrainOn = "train",
    per_class: int | None = None,
    validation_per_class: int | None = None,
    test_per_class: int | None = None,
    label_noise: float = 0.0,
    seed: int = 0,
    cache: str | Path | None = None,
) -> Dataset:
    """Find, split and decode the images of a data set.

    Args:
        data: What :func:`~tethertune.lab.sources.find` finds, or has found. A split that is missing is held out of the
            training images: 15 % of each class.
        size: Side of the decoded images in pixels.
        interpolation: How pixels are interpolated: ``"bilinear"``, ``"bicubic"``, ``"nearest"``, ...
        crop_fraction: Images from a folder are resized so that the central square with this share of the shorter side
            has the given size, and cut to it, as timm does for evaluation. Embedded images are resized whole.
        resize: See :data:`Resize`; ``"stretch"`` sets ``crop_fraction`` aside.
        train_on: With ``"train+validation"`` the training split holds both. The validation split stays what it is, so
            its figures are then of images that were trained on.
        per_class: Training images to keep of each class; None keeps all.
        validation_per_class: Validation images to keep of each class, the same for every seed; None keeps all.
        test_per_class: Test images to keep of each class, the same for every seed; None keeps all.
        label_noise: Share of the labels trained on that another class takes the place of; the labels of validation
            and test stay true.
        seed: Decides which images are held out, which ``per_class`` keeps, and which labels are wrong.
        cache: Folder of decoded images; None is ``$XDG_CACHE_HOME/tethertune``.

    Raises:
        ConfigurationError: A number or name is not allowed, or more images are to be kept than some class has.
        DataError: The folder, a class or an image cannot be used, or the cache cannot be written.
    """
    check(size, interpolation, crop_fraction, resize, train_on)
    source = sources.find(data) if isinstance(data, str) else data
    members = splits.complete(source.splits, source.labels, source.classes, seed)
    for split, key, kind, count, chance in (
        ("train", "per_class", "training", per_class, seed),
        ("validation", "validation_per_class", "validation", validation_per_class, 0),
        ("test", "test_per_class", "test", test_per_class, 0),
    ):
        of_split = members[split]
        members[split] = splits.subset(of_split, source.labels, source.classes, count, chance, key=key, kind=kind)
    if train_on == "train+validation":
        members["train"] = np.sort(np.concatenate([members["train"], members["validation"]]))
    labels = {split: source.labels[chosen] for split, chosen in members.items()}
    labels["train"] = splits.with_noise(labels["train"], len(source.classes), label_noise, seed)
    folder = Path(cache) if cache else image_cache.default_folder()
    fingerprint = image_cache.fingerprint(source, folder)
    store = image_cache.decoded(
        source,
        fingerprint,
        size=size,
        interpolation=interpolation,
        crop_fraction=None if source.cropped or resize == "stretch" else crop_fraction,
        cache=folder,
    )
    return Dataset(
        name=source.name,
        classes=source.classes,
        fingerprint=fingerprint,
        ignored=source.ignored,
        split=how_split(source, seed),
        **{split: Split(store, chosen, labels[split]) for split, chosen in members.items()},
    )


def how_split(source: sources.Source, seed: int) -> str:
    """What the source says of its splits, and which of them :func:`splits.complete` made."""
    missing = [split for split in ("validation", "test") if split not in source.splits]
    if not missing:
        return source.split
    held_out = f"{splits.HELD_OUT_PERCENT} % of each class held out with seed {seed} for {' and for '.join(missing)}"
    return held_out if len(missing) == 2 else f"{source.split}, {held_out}"


def check(size: int, interpolation: str, crop_fraction: float, resize: str, train_on: str = "train") -> None:
    """Check what decides how images are decoded.

    Raises:
        ConfigurationError: A number or name is not allowed.
    """
    if size < 1:
        raise ConfigurationError(f"size = {size}; give the side of the images in pixels, 1 or more.")
    if not 0 < crop_fraction <= 1:
        raise ConfigurationError(f"crop_fraction = {crop_fraction}; give a share above 0, at most 1.")
    for key, value, kind in (("resize", resize, Resize), ("train_on", train_on, TrainOn)):
        if value not in get_args(kind):
            raise ConfigurationError(f"{key} = {value!r} is unknown; allowed are {', '.join(get_args(kind))}.")
    images.resampling(interpolation)
