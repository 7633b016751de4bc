"""Folders of image files: classes in folders, in folders of splits or not, or images of no class."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tethertune.errors import DataError
from tethertune.lab import images
from tethertune.lab.sources.source import SPLIT_OF_WORD, Source

__all__ = ["folder", "unlabelled"]


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
    named = [name for name in folders if name in SPLIT_OF_WORD]
    strangers = [name for name in folders if name not in SPLIT_OF_WORD]
    if not named or (strangers and len(named) == 1):  # the one may be a class: a vehicle called train
        return {"train": root}
    if strangers:
        raise DataError(
            f"{root} holds {', '.join(strangers)} beside {', '.join(named)}; "
            "keep either splits (train, val, test) or classes in one folder."
        )
    if "train" not in named:
        raise DataError(f"{root} has {', '.join(named)} but no train folder; name the training images' folder train.")
    splits = {SPLIT_OF_WORD[name]: folders[name] for name in named}
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
