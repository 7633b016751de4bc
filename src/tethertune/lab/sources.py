"""Where images come from: the embedded Fashion-MNIST images, or a folder. What is there, before anything is decoded.

A folder holds image files, or the four files that MNIST and Fashion-MNIST are published as.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tethertune.errors import DataError, did_you_mean
from tethertune.lab import idx, images

__all__ = ["Source", "fashion", "find", "folder", "mnist", "unlabelled"]

_FASHION = Path(__file__).parent / "assets" / "fashion"
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
_PREFIX_OF_SPLIT = {"train": "train", "test": "t10k"}
"""What the names of the files of a split begin with where images come as in MNIST."""
_SPLIT_OF_FOLDER = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class Source:
    """The images of one data set: which there are, and how to get the i-th.

    Attributes:
        name: What to call the data set.
        root: The folder that holds the files.
        files: Every file that holds image data, relative to the root, with forward slashes, in a fixed order.
        classes: Names of the classes.
        labels: (n,) int64, the class of each image.
        splits: Images of the splits that the source tells apart: ``train``, and possibly ``validation`` and ``test``.
        image: The i-th image, in mode RGB.
        cropped: Whether the images show their object from edge to edge, so that nothing may be cut off.
        ignored: How many files were passed over: hidden ones, and those without the suffix of an image.
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


def folder(root: Path) -> Source:
    """The images in ``root/SPLIT/CLASS/`` (split ``train``, ``val``, ``test``), or in ``root/CLASS/``.

    Folders named as splits are splits if there are two or more of them, or no other; ``valid`` and ``validation`` mean
    ``val``. Folders inside a class are searched too. Hidden files, and files without the suffix of an image, are
    ignored and counted.

    Raises:
        DataError: A folder cannot be read; there are no class folders, or only one; a class has no image, or is missing
            from a split; an image lies outside the class folders; folders of classes and splits are mixed.
    """
    try:
        return _scan(root)
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}. Allow reading it or take it away.") from error


def unlabelled(root: Path) -> Source:
    """Every image in a folder and in the folders inside it, whatever they are called: one class, no splits.

    Hidden files, and files without the suffix of an image, are ignored and counted.

    Raises:
        DataError: There is no such folder, it cannot be read, or it holds no image.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give a folder of images.")
    try:
        paths = list(_files(root))
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}. Allow reading it or take it away.") from error
    files = [path.relative_to(root).as_posix() for path in paths if _is_image(path)]
    if not files:
        raise DataError(f"{root} holds no image ({len(paths)} other files); give a folder of images.")
    return Source(
        name=root.resolve().name,
        root=root,
        files=tuple(files),
        classes=("unlabelled",),
        labels=np.zeros(len(files), np.int64),
        splits={},
        image=lambda index: images.read(root / files[index]),
        ignored=len(paths) - len(files),
    )


def _tiles(mosaic: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The 28x28 images of a mosaic with a row of images for each class, as (n, 28, 28), and the class of each."""
    with Image.open(mosaic) as image:
        pixels = np.asarray(image)
    tiles = pixels.reshape(len(_FASHION_CLASSES), 28, -1, 28).transpose(0, 2, 1, 3)
    return tiles.reshape(-1, 28, 28), np.repeat(np.arange(tiles.shape[0]), tiles.shape[1])


def _scan(root: Path) -> Source:
    folders = _split_folders(root)
    classes = tuple(path.name for path in _subfolders(folders["train"]))
    if len(classes) < 2:
        raise DataError(
            f"{folders['train']} holds {len(classes)} class folders; two or more are needed, "
            "each named after its class and with the images of that class inside."
        )
    files: list[str] = []
    labels: list[int] = []
    splits: dict[str, NDArray[np.int64]] = {}
    ignored = _count_ignored({root, *folders.values()})
    for split, base in folders.items():
        _check_classes(base, classes)
        start = len(files)
        for label, name in enumerate(classes):
            paths = list(_files(base / name))
            found = [path.relative_to(root).as_posix() for path in paths if _is_image(path)]
            if not found:
                raise DataError(f"class {name!r} has no images: {base / name} holds none.")
            ignored += len(paths) - len(found)
            files += found
            labels += [label] * len(found)
        splits[split] = np.arange(start, len(files))
    return Source(
        name=root.resolve().name,
        root=root,
        files=tuple(files),
        classes=classes,
        labels=np.array(labels),
        splits=splits,
        image=lambda index: images.read(root / files[index]),
        ignored=ignored,
    )


def _split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split; a folder of classes is all ``train``."""
    folders = {path.name: path for path in _subfolders(root)}
    named = [name for name in folders if name in _SPLIT_OF_FOLDER]
    strangers = [name for name in folders if name not in _SPLIT_OF_FOLDER]
    if not named or (strangers and len(named) == 1):  # the one may be a class: a vehicle called train
        return {"train": root}
    if strangers:
        raise DataError(
            f"{root} holds {', '.join(strangers)} beside {', '.join(named)}; "
            "keep either splits (train, val, test) or classes in one folder."
        )
    if "train" not in named:
        raise DataError(f"{root} has {', '.join(named)} but no train folder; name the training images' folder train.")
    splits = {_SPLIT_OF_FOLDER[name]: folders[name] for name in named}
    if len(splits) < len(named):
        raise DataError(f"{root} has more than one validation folder; keep one of val, valid and validation.")
    return {split: splits[split] for split in ("train", "validation", "test") if split in splits}


def _check_classes(base: Path, classes: tuple[str, ...]) -> None:
    """Every split holds the classes of the training split, neither fewer nor more."""
    found = {path.name for path in _subfolders(base)}
    if missing := sorted(set(classes) - found):
        raise DataError(f"class {missing[0]!r} is missing from {base}; every split needs images of every class.")
    if unknown := sorted(found - set(classes)):
        raise DataError(f"class {unknown[0]!r} in {base} has no training images; every split needs the same classes.")


def _count_ignored(bases: set[Path]) -> int:
    """The number of files beside the class folders, none of which may be an image."""
    ignored = 0
    for path in (path for base in sorted(bases) for path in base.iterdir() if not path.is_dir()):
        if _is_image(path):
            raise DataError(f"{path} lies outside the class folders; move it into the folder of its class.")
        ignored += 1
    return ignored


def _subfolders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir() and not _is_hidden(path.name))


def _files(parent: Path) -> Iterator[Path]:
    """Every file in a folder and its visible subfolders, in order of name."""
    for place, folders, names in os.walk(parent, onerror=_raise):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        yield from (Path(place, name) for name in sorted(names))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in images.SUFFIXES and not _is_hidden(path.name)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _raise(error: OSError) -> None:
    raise error
