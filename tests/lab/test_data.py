import numpy as np
import pytest
import torch
from PIL import Image

from tethertune.errors import ConfigurationError, DataError
from tethertune.lab import data, images, sources

FOLDERS = {"train/cat": 6, "train/dog": 4, "val/cat": 2, "val/dog": 1, "test/cat": 1, "test/dog": 2}


@pytest.fixture
def folder(make_images, tmp_path):
    return make_images(tmp_path / "pets", FOLDERS)


def load(where, tmp_path, **options):
    return data.load(str(where), **{"size": 8, "cache": tmp_path / "cache"} | options)


def test_a_folder_with_splits(folder, tmp_path):
    dataset = load(folder, tmp_path)
    assert (dataset.name, dataset.classes, dataset.ignored) == ("pets", ("cat", "dog"), 0)
    assert dataset.sizes == {"train": 10, "validation": 3, "test": 3}
    assert dataset.fingerprint.startswith("sha256:")
    assert dataset.test.labels.tolist() == [0, 1, 1]
    assert dataset.test.labels.dtype == np.int64


def test_a_batch_holds_the_images_of_its_indices(folder, tmp_path):
    batch = load(folder, tmp_path, interpolation="bicubic").validation.batch(torch.tensor([2, 0]))
    assert (batch.shape, batch.dtype) == ((2, 3, 8, 8), torch.uint8)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for image, name in zip(batch, ("val/dog/00.png", "val/cat/00.png"), strict=True):
        expected = images.fit(images.read(folder / name), 8, Image.Resampling.BICUBIC, 0.875)
        assert np.array_equal(image.permute(1, 2, 0), expected)


def test_a_batch_is_a_copy(folder, tmp_path):
    split = load(folder, tmp_path).train
    before = split.batch(torch.tensor([0]))
    split.batch(torch.tensor([0])).zero_()
    assert torch.equal(split.batch(torch.tensor([0])), before)


def test_splits_share_one_store_whatever_the_seed(folder, tmp_path):
    datasets = [load(folder, tmp_path, per_class=3, seed=seed) for seed in (1, 2)]
    assert len(list((tmp_path / "cache/images").iterdir())) == 1
    assert datasets[0].train.store is datasets[0].test.store
    assert datasets[0].train.members.tolist() != datasets[1].train.members.tolist()
    for dataset in datasets:
        assert np.bincount(dataset.train.labels).tolist() == [3, 3]
        assert dataset.sizes == {"train": 6, "validation": 3, "test": 3}


def test_folders_of_classes_are_split_by_seed(make_images, tmp_path):
    folder = make_images(tmp_path / "pets", {"cat": 20, "dog": 40})
    first, again, other = (load(folder, tmp_path, seed=seed) for seed in (1, 1, 2))
    assert first.sizes == {"train": 42, "validation": 9, "test": 9}
    assert first.test.members.tolist() == again.test.members.tolist() != other.test.members.tolist()
    assert first.fingerprint == other.fingerprint
    assert other.split == "15 % of each class held out with seed 2 for validation and for test"


def test_a_missing_validation_split_is_held_out(make_images, tmp_path):
    folder = make_images(tmp_path / "pets", {"train/cat": 20, "train/dog": 7, "test/cat": 1, "test/dog": 1})
    dataset = load(folder, tmp_path)
    assert dataset.sizes == {"train": 23, "validation": 4, "test": 2}
    assert dataset.split == "as the data comes, 15 % of each class held out with seed 0 for validation"


def test_labels_belong_to_their_images_after_splitting(tmp_path):
    for label, colour in enumerate(("red", "green", "blue")):
        (tmp_path / "pets" / str(label)).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (9, 9), colour).save(tmp_path / "pets" / str(label) / f"{number}.png")
    dataset = load(tmp_path / "pets", tmp_path, per_class=4)
    for split in (dataset.train, dataset.validation, dataset.test):
        batch = split.batch(torch.arange(len(split)))
        assert batch.amax(dim=(2, 3)).argmax(dim=1).tolist() == split.labels.tolist()


def test_embedded_images(tmp_path):
    dataset = load("fashion", tmp_path, size=48, per_class=10, seed=1)
    assert (dataset.name, len(dataset.classes)) == ("fashion", 10)
    assert dataset.sizes == {"train": 100, "validation": 400, "test": 2000}
    whole = sources.fashion().image(int(dataset.test.members[5])).resize((48, 48), Image.Resampling.BILINEAR)
    assert np.array_equal(dataset.test.batch(torch.tensor([5]))[0].permute(1, 2, 0), np.asarray(whole))


def test_training_on_the_validation_images_too_leaves_the_validation_split_alone(folder, tmp_path):
    apart, both = (load(folder, tmp_path, per_class=3, train_on=value) for value in ("train", "train+validation"))
    assert both.sizes == {"train": 9, "validation": 3, "test": 3}
    assert set(both.train.members) == {*apart.train.members, *apart.validation.members}
    assert both.validation.members.tolist() == apart.validation.members.tolist()
    assert both.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1]


def test_validation_and_test_subsets_are_the_same_for_every_seed(tmp_path):
    first, other = (
        load("fashion", tmp_path, per_class=2, validation_per_class=7, test_per_class=9, seed=seed) for seed in (1, 2)
    )
    assert first.sizes == {"train": 20, "validation": 70, "test": 90}
    assert first.train.members.tolist() != other.train.members.tolist()
    for split in ("validation", "test"):
        assert getattr(first, split).members.tolist() == getattr(other, split).members.tolist()
    assert np.bincount(first.test.labels).tolist() == [9] * 10


@pytest.mark.parametrize("train_on", ["train", "train+validation"])
def test_wrong_labels_are_only_in_what_is_trained_on(tmp_path, train_on):
    clean, noisy, again, other = (
        load("fashion", tmp_path, per_class=10, label_noise=noise, seed=seed, train_on=train_on)
        for noise, seed in ((0.0, 1), (0.4, 1), (0.4, 1), (0.4, 2))
    )
    wrong = noisy.train.labels != clean.train.labels
    assert wrong.sum() == round(0.4 * len(clean.train))
    assert noisy.train.members.tolist() == clean.train.members.tolist()
    assert noisy.train.labels.tolist() == again.train.labels.tolist() != other.train.labels.tolist()
    for split in ("validation", "test"):
        assert getattr(noisy, split).labels.tolist() == getattr(clean, split).labels.tolist()


def test_stretched_images_show_everything(folder, tmp_path):
    dataset = load(folder, tmp_path, resize="stretch", interpolation="nearest")
    whole = images.read(folder / "test/cat/00.png").resize((8, 8), Image.Resampling.NEAREST)
    assert np.array_equal(dataset.test.batch(torch.tensor([0]))[0].permute(1, 2, 0), np.asarray(whole))


def test_the_default_cache_is_the_users(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    load(folder, tmp_path, cache=None)
    assert len(list((tmp_path / "home/tethertune/images").iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size = 0"),
        ({"interpolation": "cubic"}, "interpolation = 'cubic' is unknown.*Did you mean 'bicubic'"),
        ({"crop_fraction": 0.0}, "crop_fraction = 0.0"),
        ({"crop_fraction": 1.5}, "crop_fraction = 1.5"),
        ({"crop_fraction": float("nan")}, "crop_fraction = nan"),
        ({"per_class": 5}, "per_class = 5, but class 'dog' has 4 training images"),
        ({"validation_per_class": 2}, "validation_per_class = 2, but class 'dog' has 1 validation images"),
        ({"test_per_class": 2}, "test_per_class = 2, but class 'cat' has 1 test images"),
        ({"label_noise": 1.0}, "label_noise = 1.0; .* from 0 to below 1"),
        ({"label_noise": -0.1}, "label_noise = -0.1"),
        ({"resize": "squash"}, "resize = 'squash' is unknown; allowed are crop, stretch"),
        ({"train_on": "all"}, "train_on = 'all' is unknown; allowed are train, train\\+validation"),
    ],
)
def test_what_is_not_allowed_is_refused_before_anything_is_written(folder, tmp_path, options, message):
    with pytest.raises(ConfigurationError, match=message):
        load(folder, tmp_path, **options)
    assert not (tmp_path / "cache").exists()


def test_a_folder_with_a_broken_image_is_refused_by_its_name(folder, tmp_path):
    (folder / "val/dog/00.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"val/dog/00\.png as an image: the file is empty"):
        load(folder, tmp_path)
