"""Folders of WebDataset shards: tar files in which the files of one sample follow each other under one name.

They are read with the standard library, so that nothing needs to be installed, and any image can be read at once.
"""

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from tethertune.errors import DataError
from tethertune.lab import images
from tethertune.lab.sources.source import SPLIT_OF_WORD, Source, check_classes

__all__ = ["locate", "shards"]

_NAMES = "classnames.txt"
"""The names of the classes, a line each, where labels are numbers."""


@dataclass
class _Sample:
    """An image in a shard, and its label."""

    shard: Path
    key: str
    image: tarfile.TarInfo | None = None
    label: int | str | None = None


def locate(root: Path) -> list[Path]:
    """The shards in a folder, and in those of its folders that are named after a split; in order of name."""
    folders = (root, *(root / word for word in SPLIT_OF_WORD))
    return sorted(path for folder in folders for path in folder.glob("[!.]*.tar"))


def shards(root: Path) -> Source:
    """The samples in the shards of a folder, each an image with a label.

    A sample is all files of one name up to the first dot: an image (``.jpg``, ``.png``, ...), and its label as ``.cls``
    (a number or a name) or in the ``label`` of ``.json``. A shard belongs to the split that is a word of its path
    (``train-000000.tar``, ``val/000000.tar``), and to ``train`` if none is. Numbers are classes counted from 0, which
    ``classnames.txt`` may give names to, a line each.

    Raises:
        DataError: A shard is cut off or no tar file; a sample has no image or no label; labels are of two kinds; a
            class has no training image.
    """
    paths = locate(root)
    samples: list[_Sample] = []
    members: dict[str, list[int]] = {}
    for path in paths:
        inside = list(_samples(path))
        members.setdefault(_split(path.relative_to(root)), []).extend(range(len(samples), len(samples) + len(inside)))
        samples += inside
    if "train" not in members:
        raise DataError(f"{root} has shards for {', '.join(members)} and none for train.")
    splits = {split: np.array(members[split]) for split in dict.fromkeys(SPLIT_OF_WORD.values()) if split in members}
    classes = _classes(root, samples)
    number = {name: position for position, name in enumerate(classes)}
    labels = np.array([number[s.label] if isinstance(s.label, str) else s.label for s in samples], np.int64)
    check_classes(root, classes, labels, splits)
    names = [_NAMES] if (root / _NAMES).is_file() else []
    return Source(
        name=root.resolve().name,
        root=root,
        files=(*names, *(path.relative_to(root).as_posix() for path in paths)),
        classes=classes,
        labels=labels,
        splits=splits,
        image=lambda index: _read(samples[index]),
    )


def _split(path: Path) -> str:
    words = re.findall("[a-z]+", path.as_posix().lower())
    return next((SPLIT_OF_WORD[word] for word in words if word in SPLIT_OF_WORD), "train")


def _samples(shard: Path) -> Iterator[_Sample]:
    """The samples of a shard, in its order."""
    found: dict[str, _Sample] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for file in archive:
                if file.isfile():
                    folder, _, name = file.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    key = f"{folder}/{stem}"
                    _take(found.setdefault(key, _Sample(shard, key.lstrip("/"))), f".{suffix.lower()}", file, archive)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{shard} cannot be read as a shard ({error}): fetch it again.") from error
    for sample in found.values():
        if sample.image is None or sample.label is None:
            lacks = "image" if sample.image is None else "label (.cls, or label in .json)"
            raise DataError(f"sample {sample.key} in {shard} has no {lacks}; each needs one.")
    yield from found.values()


def _take(sample: _Sample, suffix: str, file: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
    """Note what a file says of its sample."""
    if suffix in images.SUFFIXES:
        sample.image = file
    elif suffix in (".cls", ".json"):
        content = archive.extractfile(file)
        text = content.read().decode(errors="replace").strip() if content else ""
        label = _label_of_json(text) if suffix == ".json" else text
        if label is not None:
            sample.label = int(label) if str(label).isdecimal() else str(label)


def _label_of_json(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value.get("label") if isinstance(value, dict) else None


def _classes(root: Path, samples: Sequence[_Sample]) -> tuple[str, ...]:
    """Names of the classes: what the labels are, or what numbers stand for."""
    texts = {sample.label for sample in samples if isinstance(sample.label, str)}
    numbers = {sample.label for sample in samples if isinstance(sample.label, int)}
    if texts and numbers:
        raise DataError(f"{root} has labels that are numbers and labels that are names ({min(texts)!r}): use one kind.")
    if texts:
        return tuple(sorted(texts))
    if not (root / _NAMES).is_file():
        return tuple(str(number) for number in range(max(numbers, default=-1) + 1))
    lines = (root / _NAMES).read_text(encoding="utf-8").splitlines()
    names = tuple(line.strip() for line in lines if line.strip())
    if max(numbers) >= len(names):
        raise DataError(f"{root} has a label {max(numbers)}, and {_NAMES} names {len(names)} classes, from 0 on.")
    return names


def _read(sample: _Sample) -> Image.Image:
    assert sample.image is not None
    with sample.shard.open("rb") as file:
        file.seek(sample.image.offset_data)
        content = file.read(sample.image.size)
    return images.read(sample.shard / PurePosixPath(sample.image.name), content)
