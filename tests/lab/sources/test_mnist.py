import numpy as np
import pytest

from tethertune.errors import DataError
from tethertune.lab import sources


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
