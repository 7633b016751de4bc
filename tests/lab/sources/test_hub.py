import sys

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, concatenate_datasets
from PIL import Image

from tethertune.errors import DataError, MissingExtraError
from tethertune.lab import cache, sources


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()


def part(labels, **columns):
    """Images that hold their label in the red channel and their number in the green one."""
    images = [Image.new("RGB", (10, 8), (label or 0, number, 0)) for number, label in enumerate(labels)]
    features = Features(photo=datasets.Image(), kind=ClassLabel(names=["cat", "dog"]))
    features |= {name: feature for name, (feature, _) in columns.items()}
    values = {name: values for name, (_, values) in columns.items()}
    return Dataset.from_dict({"photo": images, "kind": labels, **values}, features=Features(features))


@pytest.fixture
def saved(tmp_path):
    DatasetDict(train=part([0, 1, 1, 0, 1]), valid=part([1, 0]), test=part([1, 1, 0])).save_to_disk(tmp_path / "pets")
    return tmp_path / "pets"


def check(source):
    assert source.classes == ("cat", "dog")
    assert source.labels.tolist() == [0, 1, 1, 0, 1, 1, 0, 1, 1, 0]
    members = {split: members.tolist() for split, members in source.splits.items()}
    assert members == {"train": [0, 1, 2, 3, 4], "validation": [5, 6], "test": [7, 8, 9]}
    pixels = [source.image(index).getpixel((0, 0))[:2] for index in range(10)]
    assert pixels == [*zip(source.labels.tolist(), [0, 1, 2, 3, 4, 0, 1, 0, 1, 2], strict=True)]


def test_a_data_set_saved_to_disk(saved, tmp_path):
    source = sources.find(f"hf:{saved}")
    assert source.name == "pets"
    check(source)
    before = cache.fingerprint(source, tmp_path / "cache")
    part([1, 0]).save_to_disk(saved / "valid")
    part([1, 1]).save_to_disk(saved / "valid")
    assert cache.fingerprint(sources.find(f"hf:{saved}"), tmp_path / "cache") != before


def test_the_files_of_a_data_set_that_is_in_no_folder_of_ours(saved):
    """From the hub: what the library keeps of it."""
    parts = dict(datasets.load_from_disk(str(saved)))
    root, files = sys.modules["tethertune.lab.sources.hub"]._files("somebody/pets", parts)
    assert files == tuple(f"{split}/data-00000-of-00001.arrow" for split in ("train", "valid", "test"))
    assert all((root / file).is_file() for file in files)


def test_one_part_saved_to_disk(tmp_path):
    part([0, 1, 0]).save_to_disk(tmp_path / "pets")
    assert list(sources.find(f"hf:{tmp_path / 'pets'}").splits) == ["train"]


def test_a_folder_of_parquet_files(saved, tmp_path):
    (tmp_path / "parquet/data").mkdir(parents=True)
    for split, name in (("train", "train"), ("valid", "validation"), ("test", "test")):
        data = datasets.load_from_disk(str(saved))[split]
        data.to_parquet(tmp_path / f"parquet/data/{name}-00000-of-00001.parquet")
    source = sources.find(f"hf:{tmp_path / 'parquet'}")
    check(source)
    assert all((source.root / file).is_file() for file in source.files)


def test_a_folder_of_images_that_the_library_reads(tmp_path):
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "pets/train" / name).mkdir(parents=True)
        Image.new("RGB", (10, 8), (number, 0, 0)).save(tmp_path / "pets/train" / name / "0.png")
    source = sources.find(f"hf:{tmp_path / 'pets'}")
    assert [source.image(index).getpixel((0, 0))[0] for index in range(2)] == source.labels.tolist() == [0, 1]
    assert source.files == ("train/cat/0.png", "train/dog/0.png")


def test_a_transparent_image_is_laid_on_white_as_from_a_file(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    features = Features(image=datasets.Image(), label=ClassLabel(names=["a", "b"]))
    images = [Image.fromarray(pixels), Image.fromarray(pixels)]
    Dataset.from_dict({"image": images, "label": [0, 1]}, features=features).save_to_disk(tmp_path / "d")
    assert sources.find(f"hf:{tmp_path / 'd'}").image(0).getpixel((0, 0)) == (255, 255, 255)


def test_of_two_columns_of_classes_one_is_chosen(tmp_path):
    coarse = ClassLabel(names=["indoors", "outdoors"])
    part([0, 1, 0], place=(coarse, [1, 1, 0])).save_to_disk(tmp_path / "pets")
    with pytest.raises(DataError, match=r"2 columns of type ClassLabel, not one: photo \(Image\), kind .*#kind"):
        sources.find(f"hf:{tmp_path / 'pets'}")
    source = sources.find(f"hf:{tmp_path / 'pets'}#place")
    assert (source.classes, source.labels.tolist()) == (("indoors", "outdoors"), [1, 1, 0])
    with pytest.raises(DataError, match=r"no column plaice of type ClassLabel: .* Did you mean 'place'"):
        sources.find(f"hf:{tmp_path / 'pets'}#plaice")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.remove_columns("photo"), r"0 columns of images, not one: kind \(ClassLabel\)"),
        (
            lambda d: concatenate_datasets([d, d.select_columns("photo").rename_column("photo", "x")], axis=1),
            "2 columns of images, not one",
        ),
        (
            lambda d: d.cast_column("kind", Value("int64")),
            r"0 columns of type ClassLabel.*kind \(Value\); class_encode",
        ),
        (lambda d: d.select([0, 2]), "class 'dog' of .* has no training images"),
        (lambda d: DatasetDict(test=d), "has the splits test and no train"),
        (lambda d: DatasetDict(train=d, test=part([1, None, None])), "2 images without a class in test"),
    ],
)
def test_data_sets_that_cannot_be_used(tmp_path, change, message):
    change(part([0, 1, 0])).save_to_disk(tmp_path / "pets")
    with pytest.raises(DataError, match=message):
        sources.find(f"hf:{tmp_path / 'pets'}")


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(DataError, match=r"hf:nobody/nothing cannot be loaded: .*nobody/nothing"):
        sources.find("hf:nobody/nothing")
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be loaded"):
        sources.find(f"hf:{tmp_path}")


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(sys.modules["tethertune.lab.sources.hub"], "find_spec", lambda _: None)
    with pytest.raises(
        MissingExtraError, match=r"hf:cifar10 needs the package datasets: pip install 'tethertune\[hf\]'"
    ):
        sources.find("hf:cifar10")
