import numpy as np
import pytest

from tethertune.errors import ConfigurationError, DataError
from tethertune.lab import data, images
from tethertune.lab.prepare import prepare

COUNTS = {"train/cat": 6, "train/dog": 4, "val/cat": 2, "val/dog": 1, "test/cat": 1, "test/dog": 2}


@pytest.fixture
def folder(make_images, tmp_path):
    folder = make_images(tmp_path / "pets", COUNTS)
    (folder / "notes.txt").write_text("no image")
    return folder


def stores(cache):
    return sorted(path.name for path in (cache / "images").iterdir()) if (cache / "images").is_dir() else []


def test_images_are_only_checked_without_a_size(folder, tmp_path):
    found = prepare(str(folder), cache=tmp_path / "cache")
    assert (found.name, found.classes, found.ignored, found.decoded) == ("pets", ("cat", "dog"), 1, None)
    assert found.sizes == {"train": 10, "validation": 3, "test": 3}
    assert found.fingerprint.startswith("sha256:")
    assert stores(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("options", "loads"),
    [
        ({"model": "test_efficientnet"}, {"size": 160, "interpolation": "bicubic", "crop_fraction": 0.95}),
        ({"model": "resnet101.tv_in1k", "size": 9}, {"size": 9, "interpolation": "bilinear", "crop_fraction": 0.875}),
        ({"size": 8}, {"size": 8}),
        (
            {"size": 8, "interpolation": "nearest", "resize": "stretch"},
            {"size": 8, "interpolation": "nearest", "resize": "stretch"},
        ),
    ],
)
def test_runs_find_what_was_decoded(folder, tmp_path, monkeypatch, options, loads):
    prepare(str(folder), cache=tmp_path / "cache", **options)
    before = stores(tmp_path / "cache")
    assert len(before) == 1
    monkeypatch.setattr(images, "read", None)  # nothing is decoded again
    dataset = data.load(str(folder), cache=tmp_path / "cache", **loads)
    assert stores(tmp_path / "cache") == before
    assert dataset.train.store.shape[1] == loads["size"]


def test_embedded_images_are_taken_whole(tmp_path):
    found = prepare("digits", size=8, interpolation="nearest", cache=tmp_path / "cache")
    assert found.decoded == f"8 px, nearest, whole images, in {tmp_path / 'cache'}"
    dataset = data.load("digits", size=8, interpolation="nearest", cache=tmp_path / "cache")
    assert np.asarray(dataset.train.store).max() == 255


@pytest.mark.parametrize("options", [{}, {"size": 8}])
def test_all_broken_images_are_named(folder, tmp_path, options):
    (folder / "train/dog/01.png").write_bytes(b"")
    content = (folder / "test/cat/00.png").read_bytes()
    (folder / "test/cat/00.png").write_bytes(content[:70])
    with pytest.raises(DataError) as caught:
        prepare(str(folder), cache=tmp_path / "cache", **options)
    first, *named = str(caught.value).splitlines()
    assert first == "2 of 16 images cannot be used:"
    assert ["train/dog/01.png as an image: the file is empty" in named[0], "test/cat/00.png" in named[1]] == [True] * 2


def test_of_many_broken_images_some_are_named(make_images, tmp_path):
    folder = make_images(tmp_path / "pets", {"cat": 30, "dog": 30})
    for path in folder.glob("dog/*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"30 of 60 images(.*\n){21}\.\.\. and 10 more"):
        prepare(str(folder), cache=tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_no_fault_of_the_images(folder, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/images").write_text("no folder")
    with pytest.raises(DataError, match="cannot keep decoded images"):
        prepare(str(folder), size=8, cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": "stretch"}, "only checked without a size: give --model MODEL or --size"),
        ({"interpolation": "nearest"}, "only checked without a size"),
        ({"size": 0}, "size = 0"),
        ({"size": 8, "interpolation": "cubic"}, "'cubic' is unknown"),
        ({"size": 8, "resize": "squash"}, "resize = 'squash' is unknown"),
        ({"model": "resnet100"}, "'resnet100' is neither a known network"),
    ],
)
def test_what_is_not_allowed(folder, tmp_path, options, message):
    with pytest.raises(ConfigurationError, match=message):
        prepare(str(folder), cache=tmp_path / "cache", **options)


def test_the_command(tethertune, make_published, tmp_path, monkeypatch):
    make_published(tmp_path / "data")
    monkeypatch.setenv("TETHERTUNE_DATA", str(tmp_path / "data"))
    cache = tmp_path / "cache"
    code, out, _ = tethertune("prepare", "aircraft", "--model", "tf_efficientnet_b0.aa_in1k", "--cache", cache)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "aircraft: 18 images of 3 classes (6 train, 6 validation, 6 test)"
    assert lines[1].startswith("split: a small copy with 18 of 10,000 images; the data set's own lists")
    assert lines[2] == "classes: 707-320, A340-600, Boeing 737-700"
    assert lines[3].startswith("fingerprint: sha256:")
    assert lines[4] == "ignored files: 0"
    assert lines[5] == f"decoded: 224 px, bicubic, the central 0.875 of each side, in {cache}"


def test_the_command_names_what_is_broken(tethertune, make_published, tmp_path, monkeypatch):
    folder = make_published(tmp_path / "data")["dtd"]
    monkeypatch.setenv("TETHERTUNE_DATA", str(tmp_path / "data"))
    image = folder / "dtd/images/banded/banded_0003.jpg"
    image.write_bytes(image.read_bytes()[:300])
    code, out, err = tethertune("prepare", "dtd", "--cache", tmp_path / "cache")
    assert (code, out) == (2, "")
    assert "1 of 18 images cannot be used:" in err
    assert "banded_0003.jpg as an image" in err
    assert "Traceback" not in err
