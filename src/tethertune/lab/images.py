"""One image file becomes one upright RGB array of the size that the network wants."""

import math
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from tethertune.errors import ConfigurationError, DataError, did_you_mean

__all__ = ["SUFFIXES", "fit", "read", "resampling"]

SUFFIXES = frozenset(
    {".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jxl"}
    | {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)
"""What image files end with, in lower case. Some can be read only by a newer Pillow: better refused than overlooked."""

_LONGEST = 100
"""The longer side of an image is at most this many times the shorter one."""


def read(path: Path, content: bytes | None = None) -> Image.Image:
    """Decode an image file: 8-bit RGB, rotated as its EXIF orientation says.

    16-bit images are scaled to 8 bits; transparent pixels are laid on white; of an animation the first frame is taken.

    Args:
        path: The file.
        content: What is in it, if it is part of another file; ``path`` then only names it.

    Raises:
        DataError: The file is empty, truncated, no image, in a colour space without a known range, or too large: more
            pixels than ``PIL.Image.MAX_IMAGE_PIXELS``, or one side over 100 times the other.
    """
    try:
        with Image.open(path if content is None else BytesIO(content)) as image:
            _check_sides(*image.size)
            return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise nearly anything when a file is broken
        raise DataError(
            f"cannot use {path} as an image: {_reason(path, content, error)}. Repair it or take it away."
        ) from error


def fit(
    image: Image.Image, size: int, filter_: Image.Resampling, crop_fraction: float | None = None
) -> NDArray[np.uint8]:
    """Resize an RGB image to (size, size, 3).

    Args:
        image: An image in mode RGB.
        size: Side of the result in pixels.
        filter_: How pixels are interpolated; see :func:`resampling`.
        crop_fraction: None resizes the whole image and ignores its shape. A number does what timm does for evaluation:
            the shorter side becomes ``floor(size / crop_fraction)`` and the centre is cut out.
    """
    if crop_fraction is None:
        return np.asarray(image.resize((size, size), filter_))
    shorter = math.floor(size / crop_fraction)
    width, height = (int(shorter * side / min(image.size)) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.resize((width, height), filter_).crop((left, top, left + size, top + size)))


def resampling(interpolation: str) -> Image.Resampling:
    """Pillow's filter of a name: ``"bilinear"``, ``"bicubic"``, ``"nearest"`` and so on.

    Raises:
        ConfigurationError: There is no such filter.
    """
    allowed = {member.name.lower(): member for member in Image.Resampling}
    if interpolation not in allowed:
        raise ConfigurationError(
            f"interpolation = {interpolation!r} is unknown; allowed are {', '.join(allowed)}."
            f"{did_you_mean(interpolation, allowed)}"
        )
    return allowed[interpolation]


def _check_sides(width: int, height: int) -> None:
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} pixels are over the limit of {Image.MAX_IMAGE_PIXELS:,}")
    if max(width, height) > _LONGEST * min(width, height):
        raise ValueError(f"of {width} x {height} pixels one side is over {_LONGEST} times the other")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _to_8_bit(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 bits a channel")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey, which Pillow would clip at 255."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("pixels over 16 bits have no known range; save it with 8 bits a channel")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _reason(path: Path, content: bytes | None, error: Exception) -> str:
    if content == b"" or (path.is_file() and path.stat().st_size == 0):
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return "it is in no image format that the installed Pillow reads"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
