import numpy as np
import pytest
from PIL import Image

from tethertune.errors import DataError
from tethertune.lab import sources

SPLITS = {"train/cat": 3, "train/dog": 2, "val/cat": 1, "val/dog": 1, "test/cat": 2, "test/dog": 1}


def test_the_embedded_images_are_balanced_and_small():
    source = sources.fashion()
    counts = {
        split: np.bincount(source.labels[members], minlength=10).tolist() for split, members in source.splits.items()
    }
    assert counts == {"train": [20] * 10, "validation": [40] * 10, "test": [200] * 10}
    assert sorted(np.concatenate(list(source.splits.values()))) == list(range(2600))
    assert sum((source.root / name).stat().st_size for name in source.files) <= 1_500_000
    assert "Copyright (c) 2017 Zalando SE" in (source.root / "LICENSE").read_text(encoding="utf-8")


def test_the_embedded_images_are_all_different_and_none_is_in_two_splits():
    source = sources.fashion()
    assert len({source.image(index).tobytes() for index in range(2600)}) == 2600


def test_embedded_images_are_tiles_of_the_mosaic():
    source = sources.fashion()
    mosaic = Image.open(source.root / "test.png").convert("RGB")
    index = source.splits["test"][3 * 200 + 7]  # of class 3, number 7
    assert source.classes[source.labels[index]] == "dress"
    assert source.image(index).tobytes() == mosaic.crop((7 * 28, 3 * 28, 8 * 28, 4 * 28)).tobytes()


def test_a_folder_with_splits(make_images, tmp_path):
    source = sources.find(str(make_images(tmp_path / "pets", SPLITS)))
    assert (source.name, source.classes, source.ignored) == ("pets", ("cat", "dog"), 0)
    assert source.files[:4] == ("train/cat/00.png", "train/cat/01.png", "train/cat/02.png", "train/dog/00.png")
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 0, 1, 0, 0, 1]
    assert {split: members.tolist() for split, members in source.splits.items()} == {
        "train": [0, 1, 2, 3, 4],
        "validation": [5, 6],
        "test": [7, 8, 9],
    }
    with Image.open(tmp_path / "pets/test/dog/00.png") as last:
        assert source.image(9).tobytes() == last.tobytes()


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_names_of_the_validation_folder(make_images, tmp_path, name):
    make_images(tmp_path, {"train/a": 1, "train/b": 1, f"{name}/a": 1, f"{name}/b": 1})
    assert list(sources.folder(tmp_path).splits) == ["train", "validation"]


def test_a_folder_of_classes(make_images, tmp_path):
    source = sources.folder(make_images(tmp_path, {"bus": 2, "car": 2, "train": 2}))
    assert source.classes == ("bus", "car", "train")
    assert {split: members.tolist() for split, members in source.splits.items()} == {"train": list(range(6))}


def test_folders_inside_a_class_are_searched(make_images, tmp_path):
    make_images(tmp_path, {"cat/indoors": 2, "cat/outdoors/garden": 1, "dog": 1})
    assert sources.folder(tmp_path).labels.tolist() == [0, 0, 0, 1]


def test_files_that_are_no_images_are_ignored_and_counted(make_images, tmp_path):
    make_images(tmp_path, {"cat": 2, "dog": 2, ".git/objects": 1, "cat/.thumbnails": 1})
    for name in ("README.md", "cat/notes.txt", "cat/.hidden.png", "dog/Thumbs.db"):
        (tmp_path / name).write_text("not an image")
    source = sources.folder(tmp_path)
    assert (len(source.files), source.ignored) == (4, 4)


def test_suffixes_in_capitals_are_images(make_images, tmp_path):
    make_images(tmp_path, {"cat": 1, "dog": 1})
    (tmp_path / "cat/00.png").rename(tmp_path / "cat/00.PNG")
    assert sources.folder(tmp_path).files == ("cat/00.PNG", "dog/00.png")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "holds 0 class folders; two or more"),
        ({"cat": 5}, "holds 1 class folders; two or more"),
        ({".": 3}, "holds 0 class folders"),
        ({"cat": 5, "dog": 0}, "class 'dog' has no images"),
        ({"cat": 1, "dog": 0, "emu": 0}, "class 'dog' has no images"),  # fewer images than classes
        ({"cat": 1, "dog": 1, ".": 1}, r"00\.png lies outside the class folders"),
        (SPLITS | {"train": 1}, r"train/00\.png lies outside the class folders"),
        (SPLITS | {"test/dog": 0}, "class 'dog' has no images: .*test/dog"),
        (SPLITS | {"train/emu": 1}, "class 'emu' is missing from .*val"),
        (SPLITS | {"test/emu": 1}, "class 'emu' in .*test has no training images"),
        (SPLITS | {"valid/cat": 1}, "more than one validation folder"),
        (SPLITS | {"extra/cat": 1}, "extra beside test, train, val"),
        ({"val/cat": 1, "test/cat": 1}, "test, val but no train folder"),
        ({"train": 3}, "train holds 0 class folders"),
    ],
)
def test_folders_that_cannot_be_used_are_refused(make_images, tmp_path, counts, message):
    with pytest.raises(DataError, match=message):
        sources.folder(make_images(tmp_path, counts))


def test_an_unreadable_folder_is_refused(make_images, unprivileged_path):
    make_images(unprivileged_path, {"cat": 1, "dog": 1})
    (unprivileged_path / "dog").chmod(0)
    with pytest.raises(DataError, match="dog: Permission denied"):
        sources.folder(unprivileged_path)
    (unprivileged_path / "dog").chmod(0o700)


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"'fashon' is not a folder.*Did you mean 'fashion'"):
        sources.find("fashon")
    (tmp_path / "file.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="is not a folder; give 'fashion' or a folder of images"):
        sources.find(str(tmp_path / "file.zip"))


def test_the_files_of_mnist(make_idx, tmp_path):
    pixels, labels = make_idx(tmp_path / "digits")
    source = sources.find(str(tmp_path / "digits"))
    assert (source.name, source.classes, source.cropped) == ("digits", ("0", "1", "2"), True)
    assert {split: len(members) for split, members in source.splits.items()} == {"train": 30, "test": 9}
    assert source.labels.tolist() == [*labels["train"], *labels["t10k"]]
    for index, expected in ((0, pixels["train"][0]), (29, pixels["train"][29]), (30, pixels["t10k"][0])):
        image = source.image(index)
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image)[:, :, 1], expected)


def test_mnist_without_its_test_images(make_idx, tmp_path):
    make_idx(tmp_path)
    for path in tmp_path.glob("t10k-*"):
        path.unlink()
    assert list(sources.mnist(tmp_path).splits) == ["train"]


def test_mnist_with_a_file_missing(make_idx, tmp_path):
    make_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="has no train-labels-idx1-ubyte"):
        sources.mnist(tmp_path)


def test_mnist_with_more_images_than_labels(make_idx, tmp_path):
    make_idx(tmp_path, images=31)
    with pytest.raises(DataError, match="has 31 train images and 30 labels"):
        sources.mnist(tmp_path)


@pytest.mark.parametrize("labels", [[0, 1, 0, 1, 0, 1, 0, 1, 0], [0, 1, 2, 3, 0, 1, 2, 0, 1]])
def test_mnist_with_other_classes_in_its_test_images(make_idx, tmp_path, labels):
    make_idx(tmp_path, test_labels=labels)
    with pytest.raises(DataError, match=r"class (2|3) of .* is not in every split"):
        sources.mnist(tmp_path)
