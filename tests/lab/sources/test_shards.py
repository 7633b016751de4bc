import io
import json

import numpy as np
import pytest
import webdataset
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_iterator

from tethertune.errors import DataError
from tethertune.lab import sources


def sample(key, label, number=0, **other):
    """As webdataset's writer takes it; the image holds two numbers in its channels."""
    image = Image.new("RGB", (10, 8), (number, 255 - number, 0))
    return {"__key__": key, "png": image, **({"cls": label} if label is not None else {}), **other}


def write(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for one in samples:
            writer.write(one)


@pytest.fixture
def root(tmp_path):
    """Two shards for training and one of either other split."""
    for number in range(2):
        write(tmp_path / f"set-train-{number:06}.tar", [sample(f"a{i}", i % 3, 10 * number + i) for i in range(6)])
    write(tmp_path / "set-val-000000.tar", [sample(f"b{i}", i, 20 + i) for i in range(3)])
    write(tmp_path / "set-test-000000.tar", [sample(f"c{i}", i, 30 + i) for i in range(3)])
    return tmp_path


def test_shards_are_read_as_their_library_reads_them(root):
    source = sources.find(str(root))
    assert source.classes == ("0", "1", "2")
    sizes = {split: len(members) for split, members in source.splits.items()}
    assert sizes == {"train": 12, "validation": 3, "test": 3}
    for split, name in (("train", "train-000000"), ("train", "train-000001"), ("validation", "val-000000")):
        with (root / f"set-{name}.tar").open("rb") as file:
            theirs = [*group_by_keys(one | {"__url__": name} for one in tar_file_iterator(file))]
        start = 6 if name.endswith("1") else 0
        for index, one in zip(source.splits[split][start : start + 6], theirs, strict=True):
            with Image.open(io.BytesIO(one["png"])) as image:
                assert np.array_equal(np.asarray(source.image(index)), np.asarray(image))
            assert source.labels[index] == int(one["cls"])


def test_files_are_the_shards(root):
    source = sources.shards(root)
    assert source.files == (
        "set-test-000000.tar",
        "set-train-000000.tar",
        "set-train-000001.tar",
        "set-val-000000.tar",
    )


def test_folders_of_splits(tmp_path):
    for split in ("train", "validation"):
        write(tmp_path / split / "000000.tar", [sample("x", 0), sample("y", 1)])
    assert list(sources.find(str(tmp_path)).splits) == ["train", "validation"]


def test_shards_of_no_split_are_for_training(tmp_path):
    write(tmp_path / "shard-0.tar", [sample("x", 0), sample("y", 1)])
    assert {split: m.tolist() for split, m in sources.find(str(tmp_path)).splits.items()} == {"train": [0, 1]}


def test_labels_in_json_and_names_of_classes(tmp_path):
    write(
        tmp_path / "0.tar",
        [sample("x", None, json={"label": 1, "caption": "a dog"}), sample("y", None, json={"label": 0})],
    )
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    source = sources.find(str(tmp_path))
    assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [1, 0])
    assert source.files == ("classnames.txt", "0.tar")
    (tmp_path / "classnames.txt").write_text("cat\n")
    with pytest.raises(DataError, match=r"has a label 1, and classnames.txt names 1 classes"):
        sources.find(str(tmp_path))


def test_labels_that_are_names(tmp_path):
    write(tmp_path / "0.tar", [sample("x", None, cls=b"dog"), sample("y", None, json={"label": "cat"})])
    source = sources.find(str(tmp_path))
    assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [1, 0])


def test_samples_in_folders_with_dots_in_their_names(tmp_path):
    """The name of a sample ends at the first dot of the file's name, not of its folder's."""
    write(tmp_path / "0.tar", [sample("v1.0/x", 0, 5), sample("v2.0/x", 1, 6)])
    source = sources.find(str(tmp_path))
    assert [source.image(index).getpixel((0, 0))[0] for index in range(2)] == [5, 6]


def test_a_shard_that_is_cut_off_is_named(root):
    path = root / "set-train-000001.tar"
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(DataError, match=r"set-train-000001.tar cannot be read as a shard \(unexpected end of data\)"):
        sources.find(str(root))


def test_what_is_no_tar_file_is_named(root):
    (root / "set-val-000000.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(DataError, match=r"set-val-000000.tar cannot be read as a shard"):
        sources.find(str(root))


def test_a_broken_image_is_named(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (10, 8)).save(buffer, "PNG")
    broken = {"__key__": "bad", "cls": 1, "png": buffer.getvalue()[:40]}
    write(tmp_path / "0.tar", [sample("x", 0), broken])
    with pytest.raises(DataError, match=r"0\.tar/bad\.png as an image"):
        sources.find(str(tmp_path)).image(1)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([{"__key__": "x", "cls": 0}], "sample x in .* has no image"),
        ([sample("x", None)], r"sample x in .* has no label \(.cls"),
        ([sample("x", None, json={"caption": "a dog"})], "sample x in .* has no label"),
        ([{"__key__": "x", "png": Image.new("RGB", (2, 2)), "json": json.dumps([1]).encode()}], "has no label"),
        ([sample("x", 0), sample("y", None, cls=b"dog")], r"labels that are numbers and .* names \('dog'\)"),
        ([sample("x", 0), sample("y", 2)], "class '1' of .* has no training images"),
        ([sample("x", 0)], "has 1 classes; two or more"),
        ([], "has 0 classes; two or more"),
    ],
)
def test_shards_that_cannot_be_used(tmp_path, samples, message):
    write(tmp_path / "0.tar", samples)
    with pytest.raises(DataError, match=message):
        sources.find(str(tmp_path))


def test_shards_without_any_for_training(tmp_path):
    write(tmp_path / "test-0.tar", [sample("x", 0), sample("y", 1)])
    with pytest.raises(DataError, match="has shards for test and none for train"):
        sources.find(str(tmp_path))
