"""The data sets of the paper, by name: where they are looked for, how they are fetched, split and checked.

``aircraft`` lies in ``$TETHERTUNE_DATA/aircraft``, or ``~/.cache/tethertune/data/aircraft``, in the layout that its
authors publish (:mod:`~tethertune.lab.sources.layouts`), and ``aircraft:FOLDER`` in a folder of the user's. What has
another number of images than was published is refused, unless a file ``small-copy.txt`` beside it says that it is meant
to be a part, for trying things out.
"""

import hashlib
import logging
import os
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tethertune.errors import DataError
from tethertune.lab import images, splits
from tethertune.lab.files import atomic_path
from tethertune.lab.sources import layouts
from tethertune.lab.sources.layouts import Layout
from tethertune.lab.sources.source import Source

__all__ = ["PUBLISHED", "SMALL_COPY", "Published", "find", "folder"]

SMALL_COPY = "small-copy.txt"
"""A file of this name in the folder of a data set says that it is meant to hold only some of its images."""
_SEED = 0
"""Of the splits that are drawn here: the same in every run, whatever its own seed."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """A published data set.

    Attributes:
        name: What users call it.
        title: What it holds, in a few words.
        citation: The publication that it is from.
        url: Where it is to be had.
        read: Reads the layout of a folder.
        sizes: Images of each split; for the paper's data sets those of its Table 1.
        classes: Number of classes.
        split: How the splits are made, in a sentence without a full stop.
        draw: Draws the splits from the labels, where the data set does not come with them.
        torchvision: Name of torchvision's class that downloads it, if there is one.
        unpacks_to: The folder that the archive is unpacked to, which belongs into the folder of the data set.
        md5: Checksums of its lists, where they are published.
    """

    name: str
    title: str
    citation: str
    url: str
    read: Callable[[Path], Layout]
    sizes: Mapping[str, int]
    classes: int
    split: str
    unpacks_to: str
    draw: Callable[[NDArray[np.int64]], dict[str, NDArray[np.int64]]] | None = None
    torchvision: str | None = None
    md5: Mapping[str, str] = field(default_factory=dict)


_PETS = {"train": 2000, "validation": 2000, "test": 3390}

PUBLISHED = {
    entry.name: entry
    for entry in (
        Published(
            name="aircraft",
            title="FGVC-Aircraft: photos of aeroplanes, by variant",
            citation="Maji, Rahtu, Kannala, Blaschko, Vedaldi 2013, arXiv:1306.5151",
            url="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
            read=layouts.aircraft,
            sizes={"train": 3334, "validation": 3333, "test": 3333},
            classes=100,
            split="the data set's own lists images_variant_train, _val and _test",
            unpacks_to="fgvc-aircraft-2013b",
            torchvision="FGVCAircraft",
        ),
        Published(
            name="butterfly",
            title="Butterfly-200: photos of butterflies, by species",
            citation="Chen, Wu, Gao, Dong, Luo, Lin 2018, ACM Multimedia, arXiv:1808.04505",
            url="https://github.com/HCPLab-SYSU/HSE",
            read=layouts.butterfly,
            sizes={"train": 5135, "validation": 5135, "test": 15009},
            classes=200,
            split="the data set's own lists Butterfly200_train, _val and _test_release",
            unpacks_to="Butterfly200",
        ),
        Published(
            name="flowers",
            title="Oxford Flowers-102: photos of flowers, by species",
            citation="Nilsback, Zisserman 2008, ICVGIP",
            url="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
            read=layouts.flowers,
            sizes={"train": 1020, "validation": 1020, "test": 6149},
            classes=102,
            split="the data set's own setid.mat: trnid, valid and tstid",
            unpacks_to="flowers-102",
            torchvision="Flowers102",
            md5={
                "imagelabels.mat": "e0620be6f572b9609742df49c70aed4d",
                "setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c",
            },
        ),
        Published(
            name="pets",
            title="Oxford-IIIT Pets: photos of cats and dogs, by breed",
            citation="Parkhi, Vedaldi, Zisserman, Jawahar 2012, CVPR",
            url="https://www.robots.ox.ac.uk/~vgg/data/pets/",
            read=layouts.pets,
            sizes=_PETS,
            classes=37,
            split="drawn with seed 0 from all 7,390 images, each breed in proportion, because the paper's own split of"
            " these sizes is not published",
            unpacks_to="oxford-iiit-pet",
            draw=lambda labels: splits.in_proportion(labels, _PETS, _SEED),
            torchvision="OxfordIIITPet",
        ),
        Published(
            name="pubfig",
            title="PubFig83: faces of public figures, by person",
            citation="Pinto, Stone, Zickler, Cox 2011, CVPR Workshop on Biologically Consistent Vision",
            url="http://vision.seas.harvard.edu/pubfig83/",
            read=layouts.pubfig,
            sizes={"train": 10518, "validation": 1660, "test": 1660},
            classes=83,
            split="drawn with seed 0, 20 validation and 20 test images of each person, because the paper's own split of"
            " these sizes is not published",
            unpacks_to="pubfig83",
            draw=lambda labels: splits.by_class(labels, {"validation": 20, "test": 20}, "train", _SEED),
        ),
        Published(
            name="caltech256",
            title="Caltech-256: photos of objects, by category",
            citation="Griffin, Holub, Perona 2007, Caltech technical report CNS-TR-2007-001",
            url="https://data.caltech.edu/records/nyy15-4j048",
            read=layouts.caltech256,
            sizes={"train": 7680, "validation": 5120, "test": 16980},
            classes=256,
            split="drawn with seed 0, 30 training and 20 validation images of each category, the rest for testing,"
            " without the clutter, because the data set has no split of its own and the paper's is not published",
            unpacks_to="256_ObjectCategories",
            draw=lambda labels: splits.by_class(labels, {"train": 30, "validation": 20}, "test", _SEED),
            torchvision="Caltech256",
        ),
        Published(
            name="dtd",
            title="Describable Textures: photos of textures, by the word for them",
            citation="Cimpoi, Maji, Kokkinos, Mohamed, Vedaldi 2014, CVPR",
            url="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
            read=layouts.dtd,
            sizes={"train": 1880, "validation": 1880, "test": 1880},
            classes=47,
            split="the first of the data set's own ten splits: train1, val1 and test1",
            unpacks_to="dtd",
            torchvision="DTD",
        ),
    )
}
"""Every published data set by name."""


def folder(name: str) -> Path:
    """Where a data set is looked for: ``$TETHERTUNE_DATA/NAME``, or ``~/.cache/tethertune/data/NAME``."""
    root = os.environ.get("TETHERTUNE_DATA")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(root) if root else caches / "tethertune" / "data") / name


def find(name: str, place: Path | None = None) -> Source:
    """A published data set.

    Args:
        name: A key of :data:`PUBLISHED`.
        place: The folder that holds it; None looks in :func:`folder`, and downloads it there if it is nowhere.

    Raises:
        DataError: It is not there and cannot be downloaded; a file of it is missing, damaged or not the published one;
            it has not the published number of images, and is not marked as a small copy.
    """
    data_set = PUBLISHED[name]
    if place is None:
        place = folder(name)
        if not place.is_dir():
            _download(data_set, place)
    if not place.is_dir():
        raise DataError(f"{name}:{place} is not a folder; give the folder that holds {name} as it is published.")
    layout = data_set.read(place)
    is_small = any((base / SMALL_COPY).is_file() for base in (place, layout.root))
    if is_small:
        members, how = _small_split(data_set, layout)
    else:
        _check_checksums(data_set, layout)
        members, how = _split(data_set, layout), data_set.split
    return Source(
        name=name,
        root=layout.root,
        files=(*layout.lists, *layout.images),
        classes=layout.classes,
        labels=layout.labels,
        splits=members,
        image=lambda index: images.read(layout.root / layout.images[index]),
        split=how,
    )


def _split(data_set: Published, layout: Layout) -> Mapping[str, NDArray[np.int64]]:
    """The splits of a complete data set."""
    total, published = len(layout.images), sum(data_set.sizes.values())
    classes = len(layout.classes)
    if (total, classes) != (published, data_set.classes):
        raise DataError(
            f"{data_set.name} in {layout.root} has {total:,} images of {classes} classes, the published set"
            f" {published:,} of {data_set.classes}: an extraction was cut off, or files were added. Fetch it again; if"
            f" it is meant to be a small copy, say so with a file {SMALL_COPY} in that folder."
        )
    members = data_set.draw(layout.labels) if data_set.draw else layout.splits
    sizes = {split: len(members[split]) for split in data_set.sizes}
    if sizes != data_set.sizes:
        raise DataError(
            f"{data_set.name} in {layout.root} is split into {sizes}, not {data_set.sizes}: fetch it again."
        )
    return {split: members[split] for split in data_set.sizes}


def _small_split(data_set: Published, layout: Layout) -> tuple[Mapping[str, NDArray[np.int64]], str]:
    """The splits of a part of a data set, by its own lists or alike, and how they were made."""
    members, how = layout.splits, data_set.split
    if data_set.draw:
        everything = {"train": np.arange(len(layout.images))}
        members = splits.complete(everything, layout.labels, layout.classes, _SEED)
        how = f"{splits.HELD_OUT_PERCENT} % of each class held out with seed {_SEED} for validation and for test"
    share = f"{len(layout.images):,} of {sum(data_set.sizes.values()):,} images"
    _warn(f"{data_set.name} in {layout.root} is a small copy of {share}: its results are not those of the data set")
    return members, f"a small copy with {share}; {how}"


@cache
def _warn(text: str) -> None:
    """Say it once, however often a process looks for the data set."""
    _logger.warning(text)


def _check_checksums(data_set: Published, layout: Layout) -> None:
    for name, published in data_set.md5.items():
        found = hashlib.md5((layout.root / name).read_bytes(), usedforsecurity=False).hexdigest()
        if found != published:
            raise DataError(
                f"{layout.root / name} has the wrong checksum (MD5 {found}, published {published}): fetch it again; if"
                f" it is meant to be of a small copy, say so with a file {SMALL_COPY} in that folder."
            )


def _download(data_set: Published, place: Path) -> None:
    """Fetch a data set with torchvision; it appears in its place when it is whole."""
    by_hand = (
        f"Fetch it from {data_set.url} and unpack it so that {place / data_set.unpacks_to} is there, or give"
        f" {data_set.name}:FOLDER."
    )
    if data_set.torchvision is None:
        raise DataError(
            f"{data_set.name} ({data_set.title}) is not in {place}, and torchvision does not download it. {by_hand}"
        )
    from torchvision import datasets

    fetch: Any = getattr(datasets, data_set.torchvision)
    _logger.warning("downloading %s from %s to %s", data_set.name, data_set.url, place)
    try:
        with atomic_path(place) as temporary:
            temporary.mkdir()
            fetch(root=str(temporary), download=True)
            _remove_archives(temporary)
    except (OSError, RuntimeError, EOFError, tarfile.TarError, zlib.error) as error:
        if place.is_dir():
            return  # another process was faster
        raise DataError(f"{data_set.name} could not be downloaded ({_reason(error)}). {by_hand}") from error


def _remove_archives(folder: Path) -> None:
    """Take away what torchvision has unpacked and leaves where it was."""
    for pattern in ("*.tar", "*.tar.gz", "*.tgz"):
        for archive in (*folder.glob(pattern), *folder.glob(f"*/{pattern}")):
            archive.unlink()


def _reason(error: BaseException) -> str:
    if isinstance(error, RuntimeError) and "corrupted" in str(error):
        return "the file that arrived has the wrong checksum"
    if isinstance(error, (EOFError, tarfile.TarError, zlib.error)):
        return f"the archive that arrived is cut off or damaged: {error}"
    return str(getattr(error, "reason", error)).partition("\n")[0].rstrip(".") or type(error).__name__
