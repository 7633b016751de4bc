import pytest
from PIL import Image

from tethertune.errors import DataError
from tethertune.lab import sources

SPLITS = {"train/cat": 3, "train/dog": 2, "val/cat": 1, "val/dog": 1, "test/cat": 2, "test/dog": 1}


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


def test_unlabelled_images_lie_anywhere(make_images, tmp_path):
    make_images(tmp_path, {".": 1, "a/deep/er": 2, "b": 1})
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / ".hidden.png").touch()
    source = sources.unlabelled(tmp_path)
    assert source.files == ("00.png", "a/deep/er/00.png", "a/deep/er/01.png", "b/00.png")
    assert (source.ignored, source.splits, source.labels.tolist()) == (2, {}, [0] * 4)
    with Image.open(tmp_path / "b/00.png") as last:
        assert source.image(3).tobytes() == last.tobytes()


def test_unlabelled_images_that_are_none(tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        sources.unlabelled(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"holds no image \(1 other files\)"):
        sources.unlabelled(tmp_path)


def test_unlabelled_images_in_a_folder_that_cannot_be_read(make_images, unprivileged_path):
    make_images(unprivileged_path, {"cat": 1})
    (unprivileged_path / "cat").chmod(0)
    with pytest.raises(DataError, match="cat: Permission denied"):
        sources.unlabelled(unprivileged_path)
    (unprivileged_path / "cat").chmod(0o700)
