"""Data sets of Hugging Face's library ``datasets``: from its hub, or from a folder that it reads."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tethertune.errors import DataError, MissingExtraError, did_you_mean
from tethertune.lab import images
from tethertune.lab.sources.source import SPLIT_OF_WORD, Source, check_classes

__all__ = ["hub"]


def hub(place: str) -> Source:
    """A data set with one column of images and one of classes, which are found by their types.

    Args:
        place: The name of a data set on the hub, or a folder: one that ``save_to_disk`` wrote, or any that
            ``load_dataset`` reads. After a ``#`` the column of the classes, for a data set that has more than one.

    Raises:
        DataError: It cannot be loaded, has no training images, not one column of either type, an image without a class
            or a class without a training image.
        MissingExtraError: The library is not installed.
    """
    if not find_spec("datasets"):
        raise MissingExtraError(f"hf:{place} needs the package datasets: pip install 'tethertune[hf]'.")
    import datasets

    name, _, column = place.partition("#")
    parts = _parts(name)
    image, label = _columns(name, parts["train"].features, column)
    undecoded = datasets.Image(decode=False)
    columns = [part.select_columns([image]).cast_column(image, undecoded) for part in parts.values()]
    labels = [_labels(name, split, part, label) for split, part in parts.items()]
    ends = np.cumsum([len(part) for part in labels])
    splits = {split: np.arange(end - len(part), end) for split, part, end in zip(parts, labels, ends, strict=True)}
    all_labels = np.concatenate(labels)
    classes = tuple(parts["train"].features[label].names)
    check_classes(f"hf:{name}", classes, all_labels, splits)
    root, files = _files(name, parts)

    def decode(index: int) -> Image.Image:
        part = int(np.searchsorted(ends, index, side="right"))
        row = columns[part][int(index - ends[part])][image]  # counted from the end
        return images.read(Path(row["path"] or f"{name}, image {index}"), row["bytes"])

    return Source(
        name=Path(name).name,
        root=root,
        files=files,
        classes=classes,
        labels=all_labels,
        splits=splits,
        image=decode,
    )


def _parts(name: str) -> dict[str, Any]:
    """The splits that there are, ``train`` at least."""
    import datasets

    folder = Path(name)
    saved = any((folder / sign).is_file() for sign in ("dataset_dict.json", "state.json"))
    try:
        loaded: Any = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except Exception as error:  # the library and those below it raise nearly anything
        raise DataError(f"hf:{name} cannot be loaded: {str(error).partition(chr(10))[0].rstrip('.')}.") from error
    given = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    parts: dict[str, Any] = {}
    for word, split in SPLIT_OF_WORD.items():
        if word in given:
            parts.setdefault(split, given[word])
    if "train" not in parts:
        raise DataError(f"hf:{name} has the splits {', '.join(given)} and no train.")
    return parts


def _columns(name: str, features: Mapping[str, Any], label: str) -> tuple[str, str]:
    """The columns of images and classes."""
    import datasets

    there = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in features.items())
    found = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(found) != 1:
        raise DataError(f"hf:{name} has {len(found)} columns of images, not one: {there}.")
    labels = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if label and label not in labels:
        raise DataError(f"hf:{name} has no column {label} of type ClassLabel: {there}.{did_you_mean(label, labels)}")
    if not label and len(labels) != 1:
        advice = "class_encode_column makes one" if not labels else f"choose with hf:{name}#{labels[0]}"
        raise DataError(f"hf:{name} has {len(labels)} columns of type ClassLabel, not one: {there}; {advice}.")
    return found[0], label or labels[0]


def _labels(name: str, split: str, part: Any, label: str) -> NDArray[np.int64]:
    labels = np.array([-1 if value is None else value for value in part[label]], np.int64)
    if missing := int((labels < 0).sum()):
        raise DataError(f"hf:{name} has {missing} images without a class in {split}: take them out.")
    return labels


def _files(name: str, parts: Mapping[str, Any]) -> tuple[Path, tuple[str, ...]]:
    """The files that the data set is in: those of the folder, or those that the library keeps of one from the hub."""
    root = Path(name)
    if root.is_dir():
        paths = sorted(path for path in root.rglob("*") if path.is_file())
    else:
        paths = [Path(file["filename"]) for part in parts.values() for file in part.cache_files]
        root = Path(os.path.commonpath([path.parent for path in paths]))
    return root, tuple(path.relative_to(root).as_posix() for path in paths)
