"""A data set made ready for runs: found or downloaded, every image checked, decoded once into the cache they share."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from PIL import Image

from tethertune.errors import ConfigurationError, DataError
from tethertune.lab import architectures, data, sources, splits
from tethertune.lab import cache as image_cache
from tethertune.lab.architectures import Preprocessing
from tethertune.lab.data import Resize
from tethertune.lab.display import Display
from tethertune.lab.sources import Source

__all__ = ["Preparation", "prepare"]

_NAMED = 20
"""Images that are named in one message, of those that cannot be used."""


@dataclass(frozen=True)
class Preparation:
    """What was found, and what was done with it.

    Attributes:
        name: The data set.
        classes: Names of its classes.
        sizes: Number of images in each split.
        split: How the splits were made.
        fingerprint: ``"sha256:..."`` of the names and contents of the files.
        ignored: Number of files that are hidden or no images.
        decoded: Size, interpolation and cut of the images in the cache; None if they were only checked.
    """

    name: str
    classes: tuple[str, ...]
    sizes: dict[str, int]
    split: str
    fingerprint: str
    ignored: int
    decoded: str | None

    def __str__(self) -> str:
        sizes = ", ".join(f"{number:,} {split}" for split, number in self.sizes.items())
        return "\n".join(
            (
                f"{self.name}: {sum(self.sizes.values()):,} images of {len(self.classes)} classes ({sizes})",
                f"split: {self.split}",
                f"classes: {', '.join(self.classes)}",
                f"fingerprint: {self.fingerprint}",
                f"ignored files: {self.ignored:,}",
                f"decoded: {self.decoded or 'no, only checked (--model or --size decodes them)'}",
            )
        )


def prepare(
    name: str,
    *,
    model: str | None = None,
    size: int | None = None,
    interpolation: str | None = None,
    resize: Resize = "crop",
    cache: str | Path | None = None,
    quiet: bool = False,
) -> Preparation:
    """Find a data set, check every image of it, and decode it for the runs of a network.

    Args:
        name: The data set; see :func:`tethertune.lab.sources.find`.
        model: The network that it is decoded for, by name. Without it and without a size images are only checked.
        size: Side of the decoded images in pixels; not given: the network's own.
        interpolation: How pixels are interpolated; not given: the network's own, or ``"bilinear"`` without a network.
        resize: How photos become square.
        cache: Folder of decoded images; None is ``$XDG_CACHE_HOME/tethertune``.
        quiet: Show no progress.

    Raises:
        ConfigurationError: An unknown network or interpolation, a size that is not allowed, or none for what needs it.
        DataError: The data set cannot be found or used; of its images all that cannot be used are looked for.
    """
    wanted = _wanted(model, size, interpolation, resize)
    folder = Path(cache) if cache else image_cache.default_folder()
    source = sources.find(name)
    members = splits.complete(source.splits, source.labels, source.classes, seed=0)
    fingerprint = image_cache.fingerprint(source, folder)
    decoded = None
    if wanted is None:
        _check(source, quiet=quiet)
    else:
        crop = None if source.cropped or resize == "stretch" else wanted.crop
        with Display(f"decoding {source.name}", len(source.labels), quiet=quiet) as display:
            try:
                image_cache.decoded(
                    replace(source, image=_counted(source.image, display)),
                    fingerprint,
                    size=wanted.size,
                    interpolation=wanted.interpolation,
                    crop_fraction=crop,
                    cache=folder,
                )
            except DataError:
                _check(source, quiet=quiet)  # names all that are broken, not only the first
                raise
        cut = "whole images" if crop is None else f"the central {crop:.4g} of each side"
        decoded = f"{wanted.size} px, {wanted.interpolation}, {cut}, in {folder}"
    return Preparation(
        name=source.name,
        classes=source.classes,
        sizes={split: len(members[split]) for split in ("train", "validation", "test")},
        split=data.how_split(source, seed=0),
        fingerprint=fingerprint,
        ignored=source.ignored,
        decoded=decoded,
    )


def _wanted(model: str | None, size: int | None, interpolation: str | None, resize: str) -> Preprocessing | None:
    """How images are to be decoded, if they are."""
    own = architectures.find(model).preprocessing() if model else None
    if own is None and size is None:
        if interpolation or resize != "crop":
            raise ConfigurationError("images are only checked without a size: give --model MODEL or --size too.")
        return None
    own = own or Preprocessing((0.0,) * 3, (1.0,) * 3, 224, "bilinear", 0.875)
    wanted = replace(own, size=own.size if size is None else size, interpolation=interpolation or own.interpolation)
    data.check(wanted.size, wanted.interpolation, wanted.crop, resize)
    return wanted


def _check(source: Source, *, quiet: bool) -> None:
    """Decode every image.

    Raises:
        DataError: Some cannot be used.
    """
    with Display(f"checking {source.name}", len(source.labels), quiet=quiet) as display, ThreadPoolExecutor() as pool:
        image = _counted(source.image, display)

        def fault(index: int) -> str | None:
            try:
                image(index)
            except DataError as error:
                return str(error)
            return None

        faults = [text for text in pool.map(fault, range(len(source.labels))) if text]
    if faults:
        more = [f"... and {len(faults) - _NAMED} more"] if len(faults) > _NAMED else []
        raise DataError(
            "\n".join((f"{len(faults):,} of {len(source.labels):,} images cannot be used:", *faults[:_NAMED], *more))
        )


def _counted(image: Callable[[int], Image.Image], display: Display) -> Callable[[int], Image.Image]:
    """The same, with the bar moved."""
    done = count(1)

    def counted(index: int) -> Image.Image:
        found = image(index)
        display.step(next(done), str)
        return found

    return counted
