import math
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

from tethertune.errors import ConfigurationError, DataError
from tethertune.lab import images

BILINEAR = Image.Resampling.BILINEAR


@pytest.fixture
def photo():
    """RGB, 40 wide and 24 high: smooth, so that JPEG keeps it, and different in each quarter."""
    down, across = np.mgrid[0:24, 0:40]
    return Image.fromarray(np.stack([down * 10, across * 6, 255 - down * 5 - across * 3], axis=2).astype(np.uint8))


def pixels(path):
    image = images.read(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm", ".tga"])
def test_lossless_rgb_is_read_as_it_is(photo, tmp_path, suffix):
    photo.save(tmp_path / f"image{suffix}")
    assert np.array_equal(pixels(tmp_path / f"image{suffix}"), np.asarray(photo))


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_rgb_is_nearly_what_it_was(photo, tmp_path, suffix):
    photo.save(tmp_path / f"image{suffix}", quality=95)
    assert abs(pixels(tmp_path / f"image{suffix}") - np.asarray(photo)).mean() < 3


def test_the_contents_count_not_the_suffix(photo, tmp_path):
    photo.save(tmp_path / "image.jpg", format="PNG")
    assert np.array_equal(pixels(tmp_path / "image.jpg"), np.asarray(photo))


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_gets_three_equal_channels(photo, tmp_path, mode):
    grey = photo.convert(mode)
    grey.save(tmp_path / "grey.png")
    expected = np.asarray(grey.convert("L"))
    assert np.array_equal(pixels(tmp_path / "grey.png"), np.stack([expected] * 3, axis=2))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257, 128 * 257 + 100, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep{suffix}")
    assert pixels(tmp_path / f"deep{suffix}")[0, :, 0].tolist() == [0, 1, 128, 255]


def test_pixels_without_a_known_range_are_refused(tmp_path):
    Image.fromarray(np.array([[0.0, 0.5]], np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.array([[0, 1_000_000]], np.int32)).save(tmp_path / "wide.tif")
    for name in ("float.tif", "wide.tif"):
        with pytest.raises(DataError, match=rf"{name}.*no known range; save it with 8 bits"):
            images.read(tmp_path / name)


def test_cmyk_jpeg(photo, tmp_path):
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    with Image.open(tmp_path / "cmyk.jpg") as stored:
        assert stored.mode == "CMYK"
    assert abs(pixels(tmp_path / "cmyk.jpg") - np.asarray(photo)).mean() < 6


def test_transparency_is_laid_on_white(tmp_path):
    image = Image.fromarray(np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 51]]], np.uint8))
    image.save(tmp_path / "alpha.png")
    assert pixels(tmp_path / "alpha.png")[0].tolist() == [[200, 0, 0], [255, 255, 255], [244, 204, 204]]


def test_grey_with_alpha(tmp_path):
    Image.fromarray(np.array([[[9, 255], [9, 0]]], np.uint8), mode="LA").save(tmp_path / "grey.png")
    assert pixels(tmp_path / "grey.png")[0].tolist() == [[9, 9, 9], [255, 255, 255]]


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_a_palette_with_a_transparent_colour(tmp_path, suffix):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / f"palette{suffix}", transparency=1)
    assert pixels(tmp_path / f"palette{suffix}")[0].tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]


def test_a_palette_with_an_alpha_for_each_colour(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    image.putpalette([200, 0, 0, 0, 0, 0])
    image.save(tmp_path / "palette.png", transparency=bytes([51, 255]))
    assert pixels(tmp_path / "palette.png")[0].tolist() == [[244, 204, 204], [0, 0, 0]]


def test_exif_orientation_is_applied(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the image must be turned clockwise
    photo.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "turned.png"), np.rot90(np.asarray(photo), -1))


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert pixels(tmp_path / "film.gif")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("name", "contents", "reason"),
    [
        ("empty.png", b"", "the file is empty"),
        ("text.jpg", b"this is no image", "in no image format"),
        ("header.png", b"\x89PNG\r\n\x1a\n", "in no image format"),
    ],
)
def test_files_without_an_image_are_refused_by_name(tmp_path, name, contents, reason):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(DataError, match=rf"{name} as an image: .*{reason}"):
        images.read(tmp_path / name)


def test_an_image_inside_another_file(photo, tmp_path):
    photo.save(tmp_path / "image.png")
    content = (tmp_path / "image.png").read_bytes()
    assert np.array_equal(np.asarray(images.read(tmp_path / "shard.tar/7.png", content)), np.asarray(photo))
    for broken, reason in ((b"", "the file is empty"), (b"text", "in no image format")):
        with pytest.raises(DataError, match=rf"shard\.tar/7\.png as an image: .*{reason}"):
            images.read(tmp_path / "shard.tar/7.png", broken)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".tif", ".bmp", ".webp"])
def test_truncated_files_are_refused_by_name(photo, tmp_path, suffix):
    path = tmp_path / f"half{suffix}"
    photo.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=path.name):
        images.read(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".tif", ".webp"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about broken metadata
def test_damaged_files_give_an_image_or_a_data_error_and_nothing_else(photo, tmp_path, suffix):
    path = tmp_path / f"damaged{suffix}"
    photo.save(path)
    whole = path.read_bytes()
    refused = 0
    chance = random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(8):
            damaged[chance.randrange(len(whole))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            images.read(path)
        except DataError:
            refused += 1
    assert refused > 0


def test_a_missing_file_is_refused_by_name(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"link\.png.*No such file"):
        images.read(tmp_path / "link.png")


@pytest.mark.parametrize("side", [9_500, 60_000])  # Pillow warns of the first and refuses the second
def test_a_decompression_bomb_is_refused(tmp_path, side):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    with pytest.raises(DataError, match=r"bomb\.png.*(pixels|limit)"):
        images.read(tmp_path / "bomb.png")


def test_our_own_limit_follows_pillows(photo, tmp_path, monkeypatch):
    photo.save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 24)
    images.read(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    images.read(tmp_path / "image.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_where_pillow_only_warns(photo, tmp_path, monkeypatch):
    photo.save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 24 - 1)
    with pytest.raises(DataError, match="40 x 24 pixels are over the limit of 959"):
        images.read(tmp_path / "image.png")


def test_a_sliver_is_refused(tmp_path):
    Image.new("L", (1, 101)).save(tmp_path / "sliver.png")
    with pytest.raises(DataError, match="over 100 times"):
        images.read(tmp_path / "sliver.png")


@pytest.mark.parametrize("sides", [(40, 24), (24, 40), (7, 7), (300, 11)])
@pytest.mark.parametrize("crop_fraction", [None, 0.875, 0.95, 1.0])
def test_fit_gives_exactly_the_size(sides, crop_fraction):
    assert images.fit(Image.new("RGB", sides), 17, BILINEAR, crop_fraction).shape == (17, 17, 3)


def test_fit_without_a_crop_resizes_the_whole_image(photo):
    assert np.array_equal(images.fit(photo, 16, BILINEAR), np.asarray(photo.resize((16, 16), BILINEAR)))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "crop_fraction"), [(16, 0.875), (15, 0.95), (48, 0.8), (9, 1.0)])
@pytest.mark.parametrize("sides", [(40, 24), (23, 40), (31, 31)])
def test_fit_with_a_crop_is_timms_evaluation(photo, interpolation, size, crop_fraction, sides):
    image = photo.resize(sides)
    evaluation = transforms.Compose(
        [
            transforms.Resize(math.floor(size / crop_fraction), transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(size),
        ]
    )
    fitted = images.fit(image, size, images.resampling(interpolation), crop_fraction)
    assert np.array_equal(fitted, np.asarray(evaluation(image)))


def test_filters_by_name():
    assert images.resampling("bicubic") is Image.Resampling.BICUBIC
    with pytest.raises(ConfigurationError, match=r"'bilinaer' is unknown.*Did you mean 'bilinear'"):
        images.resampling("bilinaer")
