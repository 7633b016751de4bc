"""Published data sets in the files that they come in: what each folder holds, as its authors laid it out.

A reader takes a folder and gives a :class:`Layout`. Whether it is the whole data set is for
:mod:`~tethertune.lab.sources.published` to judge; here a list that is missing, or that names an image which is not
there, is an error.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tethertune.errors import DataError, MissingExtraError

__all__ = ["Layout", "aircraft", "butterfly", "caltech256", "dtd", "flowers", "pets", "pubfig"]

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Layout:
    """What a folder holds.

    Attributes:
        root: The folder that names are relative to.
        images: The image files.
        classes: Names of the classes.
        labels: (n,) int64, the class of each image.
        splits: Images of each split, if the data set comes with lists of them.
        lists: The files that labels and splits were read from.
    """

    root: Path
    images: tuple[str, ...]
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    splits: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    lists: tuple[str, ...] = ()


def aircraft(folder: Path) -> Layout:
    """FGVC-Aircraft: ``data/images/NUMBER.jpg``, ``data/variants.txt``, ``data/images_variant_{train,val,test}.txt``.

    A line of a list is the number of an image and the name of its variant.
    """
    root = _root(folder, "data/variants.txt", "fgvc-aircraft-2013b")
    parts = []
    for split, list_ in _lists("data/images_variant_{}.txt"):
        lines = (line.partition(" ") for line in _lines(root, list_))
        parts.append(_Part(split, list_, [(f"data/images/{number}.jpg", variant) for number, _, variant in lines]))
    return _listed(root, parts, tuple(_lines(root, "data/variants.txt")), "data/variants.txt")


def butterfly(folder: Path) -> Layout:
    """Butterfly-200: ``images/NUMBER.SPECIES/*.jpg`` and ``Butterfly200_{train,val,test}_release.txt``.

    A line of a list is the path of an image and the numbers of its species, genus, subfamily and family. The smaller
    copies of the images that are published too, ``images_small``, are taken where ``images`` is not there.
    """
    root = _root(folder, "Butterfly200_train_release.txt", "Butterfly200")
    base = next((name for name in ("images", "images_small") if (root / name).is_dir()), "images")
    parts = []
    for split, list_ in _lists("Butterfly200_{}_release.txt"):
        images = (line.partition(" ")[0] for line in _lines(root, list_))
        parts.append(_Part(split, list_, [(f"{base}/{image}", image.partition("/")[0]) for image in images]))
    return _listed(root, parts, _names(parts))


def flowers(folder: Path) -> Layout:
    """Oxford Flowers-102: ``jpg/image_NUMBER.jpg``, ``imagelabels.mat`` and ``setid.mat``, numbered from 1."""
    root = _root(folder, "setid.mat", "flowers-102")
    (labels,) = _matlab(root / "imagelabels.mat", "labels")
    numbers = _matlab(root / "setid.mat", "trnid", "valid", "tstid")
    names = _flower_names()
    chosen = np.concatenate(numbers)
    fits = all(map(len, numbers)) and len(labels) and 1 <= chosen.min() <= chosen.max() <= len(labels)
    if not (fits and 1 <= labels.min() <= labels.max() <= len(names)):
        raise DataError(f"imagelabels.mat and setid.mat in {root} do not go together: fetch both again.")
    parts = [
        _Part(split, "setid.mat", [(f"jpg/image_{number:05}.jpg", names[labels[number - 1] - 1]) for number in members])
        for split, members in zip(_SPLITS, numbers, strict=True)
    ]
    classes = tuple(names[number - 1] for number in sorted(set(labels.tolist())))
    return _listed(root, parts, classes, "imagelabels.mat")


def pets(folder: Path) -> Layout:
    """Oxford-IIIT Pets: ``images/BREED_NUMBER.jpg``, of which ``annotations/list.txt`` names all but 41.

    Those 41 are of the data set too: the paper's splits add up to all images.
    """
    root = _root(folder, "annotations/list.txt", "oxford-iiit-pet")
    images = _images(root, "images")
    named = [line.split()[0] for line in _lines(root, "annotations/list.txt") if not line.startswith("#")]
    _check_there(root, "annotations/list.txt", [f"images/{name}.jpg" for name in named])
    return _sorted(root, [(image, Path(image).stem.rpartition("_")[0]) for image in images], ("annotations/list.txt",))


def pubfig(folder: Path) -> Layout:
    """PubFig83: a folder of JPEG files for each person."""
    root = next((inside for inside in (folder / "pubfig83", folder) if inside.is_dir()), folder)
    return _sorted(root, [(image, image.partition("/")[0]) for image in _images_of_folders(root)])


def caltech256(folder: Path) -> Layout:
    """Caltech-256: ``256_ObjectCategories/NUMBER.CATEGORY/*.jpg``, without the 257th, which is clutter."""
    root = _root(folder, "256_ObjectCategories", "caltech256")
    images = [image for image in _images_of_folders(root / "256_ObjectCategories") if ".clutter/" not in image]
    return _sorted(root, [(f"256_ObjectCategories/{image}", image.partition("/")[0]) for image in images])


def dtd(folder: Path) -> Layout:
    """Describable Textures: ``images/TEXTURE/*.jpg`` and ``labels/{train,val,test}1.txt``, the first of ten splits."""
    root = _root(folder, "labels/train1.txt", "dtd", "dtd/dtd")
    parts = [
        _Part(split, list_, [(f"images/{image}", image.partition("/")[0]) for image in _lines(root, list_)])
        for split, list_ in _lists("labels/{}1.txt")
    ]
    return _listed(root, parts, _names(parts))


@dataclass(frozen=True)
class _Part:
    """The members of a split, each with its class, and the list that names them."""

    split: str
    list_: str
    members: Sequence[tuple[str, str]]


def _root(folder: Path, sign: str, *inside: str) -> Path:
    """The folder that holds ``sign``: the given one, or one that its archive is unpacked to inside it."""
    for root in (folder, *(folder / name for name in inside)):
        if (root / sign).exists():
            return root
    raise DataError(
        f"{folder} has no {sign}, which the data set comes with: the download or its unpacking was cut off."
    )


def _lists(pattern: str) -> list[tuple[str, str]]:
    """The splits and the file that lists the members of each."""
    return [(split, pattern.format(name)) for split, name in zip(_SPLITS, ("train", "val", "test"), strict=True)]


def _lines(root: Path, name: str) -> list[str]:
    """The lines of a list that are not empty."""
    try:
        lines = [line.strip() for line in (root / name).read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError as error:
        raise DataError(f"{root / name} is missing: it is one of the data set's own files, fetch it again.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{root / name} cannot be read ({error}): fetch it again.") from error
    return [line for line in lines if line]


def _matlab(path: Path, *names: str) -> list[NDArray[np.int64]]:
    """Vectors of whole numbers in a Matlab file."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise MissingExtraError("flowers needs the package scipy: pip install 'tethertune[lab]'.") from error
    if not path.is_file():
        raise DataError(f"{path} is missing: it is one of the data set's own files, fetch it again.")
    try:
        content: dict[str, Any] = loadmat(path)
        return [content[name].reshape(-1).astype(np.int64) for name in names]
    except Exception as error:  # scipy raises nearly anything when a file is broken
        raise DataError(f"{path} cannot be read as a Matlab file with {', '.join(names)}: fetch it again.") from error


def _flower_names() -> Sequence[str]:
    """The names that torchvision knows the 102 classes by; older versions know none, and the number stands in."""
    from torchvision.datasets import Flowers102

    names: Sequence[str] = getattr(Flowers102, "classes", [str(number) for number in range(1, 103)])
    return names


def _images(root: Path, folder: str) -> list[str]:
    """The JPEG files in a folder, in order of name."""
    if not (root / folder).is_dir():
        raise DataError(f"{root / folder} is missing: the download or its unpacking was cut off, fetch it again.")
    return sorted(f"{folder}/{path.name}" for path in (root / folder).glob("[!.]*.jpg"))


def _images_of_folders(root: Path) -> list[str]:
    """The JPEG files in the folders of a folder, in order of name."""
    return sorted(path.relative_to(root).as_posix() for path in root.glob("[!.]*/[!.]*.jpg"))


def _check_there(root: Path, list_: str, images: Iterable[str]) -> None:
    missing = [image for image in images if not (root / image).is_file()]
    if missing:
        raise DataError(
            f"{list_} in {root} names {missing[0]}, which is not there ({len(missing)} such images): the download or"
            " its unpacking was cut off, fetch it again."
        )


def _names(parts: Iterable[_Part]) -> tuple[str, ...]:
    """The classes that lists name, sorted."""
    return tuple(sorted({name for part in parts for _, name in part.members}))


def _listed(root: Path, parts: Sequence[_Part], classes: tuple[str, ...], *lists: str) -> Layout:
    """The layout of a data set whose lists name the members of each split; ``lists`` are the others that were read."""
    number = {name: label for label, name in enumerate(classes)}
    images: list[str] = []
    labels: list[int] = []
    splits: dict[str, NDArray[np.int64]] = {}
    for part in parts:
        _check_there(root, part.list_, (image for image, _ in part.members))
        for image, name in part.members:
            if name not in number:
                raise DataError(f"{part.list_} in {root} says that {image} is of the unknown class {name!r}.")
            images.append(image)
            labels.append(number[name])
        splits[part.split] = np.arange(len(images) - len(part.members), len(images))
    all_lists = tuple(dict.fromkeys((*lists, *(part.list_ for part in parts))))
    return Layout(root, tuple(images), classes, np.array(labels, np.int64), splits, all_lists)


def _sorted(root: Path, pairs: Sequence[tuple[str, str]], lists: tuple[str, ...] = ()) -> Layout:
    """The layout of a data set without splits, from each image and its class; capitals do not matter to their order."""
    classes = tuple(sorted({name for _, name in pairs}, key=lambda name: (name.casefold(), name)))
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number[name] for _, name in pairs], np.int64)
    return Layout(root, tuple(image for image, _ in pairs), classes, labels, {}, lists)
