import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from tethertune.errors import DataError
from tethertune.lab.sources import layouts

READERS = ("aircraft", "butterfly", "caltech256", "dtd", "flowers", "pets", "pubfig")


def touch(root, *names):
    """An empty file of each name, as readers look at names alone."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write(root, name, *lines):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def told(layout):
    """Image and class of each member of each split."""
    named = [(image, layout.classes[label]) for image, label in zip(layout.images, layout.labels, strict=True)]
    return {split: [named[member] for member in members] for split, members in layout.splits.items()}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_finds_each_image_once_with_the_class_that_it_shows(make_published, tmp_path, name):
    root = make_published(tmp_path / "data")[name]
    layout = getattr(layouts, name)(root)
    assert len(set(layout.images)) == len(layout.images) == len(layout.labels) == 18
    assert np.bincount(layout.labels).tolist() == [6] * 3
    assert layout.labels.dtype == np.int64
    for image, label in zip(layout.images, layout.labels, strict=True):
        with Image.open(layout.root / image) as shown:
            assert np.asarray(shown).mean(axis=(0, 1)).argmax() == label
    assert all((layout.root / list_).is_file() for list_ in layout.lists)
    assert getattr(layouts, name)(layout.root).images == layout.images


@pytest.mark.parametrize("name", READERS)
def test_a_folder_without_anything_is_told(tmp_path, name):
    if name == "pubfig":
        assert layouts.pubfig(tmp_path).images == ()
    else:
        with pytest.raises(DataError, match="the download or its unpacking was cut off"):
            getattr(layouts, name)(tmp_path)


def test_aircraft_keep_the_order_of_their_variants_and_blanks_in_names(tmp_path):
    write(tmp_path, "data/variants.txt", "MD-11", "Boeing 737-700", "A340 600")
    touch(tmp_path, *(f"data/images/{number}.jpg" for number in ("0001", "0002", "0003")))
    write(tmp_path, "data/images_variant_train.txt", "0003 A340 600", "", "0001 MD-11")
    write(tmp_path, "data/images_variant_val.txt", "0002 Boeing 737-700")
    write(tmp_path, "data/images_variant_test.txt")
    layout = layouts.aircraft(tmp_path)
    assert layout.classes == ("MD-11", "Boeing 737-700", "A340 600")
    assert told(layout) == {
        "train": [("data/images/0003.jpg", "A340 600"), ("data/images/0001.jpg", "MD-11")],
        "validation": [("data/images/0002.jpg", "Boeing 737-700")],
        "test": [],
    }


def test_the_smaller_butterflies_are_taken_where_the_large_ones_are_not(tmp_path):
    touch(tmp_path, "images_small/001.A_b/1.jpg", "images_small/002.C_d/2.jpg")
    write(tmp_path, "Butterfly200_train_release.txt", "001.A_b/1.jpg 1 1 1 1", "002.C_d/2.jpg 2 1 1 1")
    for split in ("val", "test"):
        write(tmp_path, f"Butterfly200_{split}_release.txt")
    assert layouts.butterfly(tmp_path).images == ("images_small/001.A_b/1.jpg", "images_small/002.C_d/2.jpg")
    touch(tmp_path, "images/001.A_b/1.jpg", "images/002.C_d/2.jpg")
    assert layouts.butterfly(tmp_path).images == ("images/001.A_b/1.jpg", "images/002.C_d/2.jpg")


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_flowers_are_numbered_from_1_in_images_labels_and_splits(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("flowers")
    labels = data.draw(st.lists(st.integers(1, 102), min_size=3, max_size=9))
    order = data.draw(st.permutations(range(1, len(labels) + 1)))
    thirds = [order[:1], order[1:2], order[2:]]
    touch(root, *(f"jpg/image_{number:05}.jpg" for number in order))
    savemat(root / "imagelabels.mat", {"labels": labels})
    savemat(root / "setid.mat", dict(zip(("trnid", "valid", "tstid"), thirds, strict=True)))
    layout = layouts.flowers(root)
    names = layouts._flower_names()
    assert len(set(names)) == 102
    assert told(layout) == {
        split: [(f"jpg/image_{number:05}.jpg", names[labels[number - 1] - 1]) for number in third]
        for split, third in zip(("train", "validation", "test"), thirds, strict=True)
    }


@pytest.mark.parametrize(
    ("labels", "splits"),
    [([1, 2], [[1], [], [2]]), ([], [[1], [2], [3]]), ([1, 2], [[1], [2], [3]]), ([1, 2], [[0], [1], [2]])],
)
def test_flowers_whose_files_do_not_go_together_are_told(tmp_path, labels, splits):
    touch(tmp_path, *(f"jpg/image_{number:05}.jpg" for number in (1, 2)))
    savemat(tmp_path / "imagelabels.mat", {"labels": np.array([labels])})
    savemat(
        tmp_path / "setid.mat",
        {name: np.array([x]) for name, x in zip(("trnid", "valid", "tstid"), splits, strict=True)},
    )
    with pytest.raises(DataError, match="do not go together"):
        layouts.flowers(tmp_path)


def test_classes_that_differ_in_capitals_alone_have_one_order(tmp_path):
    touch(tmp_path, "b/1.jpg", "ada/1.jpg", "Ada/1.jpg", "ADA/1.jpg")
    assert layouts.pubfig(tmp_path).classes == ("ADA", "Ada", "ada", "b")


def test_pets_that_the_list_leaves_out_belong_to_the_data_set(tmp_path):
    touch(tmp_path, *(f"images/{name}.jpg" for name in ("Bengal_1", "american_bulldog_10", "Bengal_2", "Abyssinian_3")))
    touch(tmp_path, "images/Bengal_1.mat", "images/._Bengal_9.jpg")
    write(tmp_path, "annotations/list.txt", "#Image CLASS-ID SPECIES BREED ID", "Bengal_1 1 1 1", "Abyssinian_3 2 1 2")
    layout = layouts.pets(tmp_path)
    assert layout.classes == ("Abyssinian", "american_bulldog", "Bengal")
    assert [(image, layout.classes[label]) for image, label in zip(layout.images, layout.labels, strict=True)] == [
        ("images/Abyssinian_3.jpg", "Abyssinian"),
        ("images/Bengal_1.jpg", "Bengal"),
        ("images/Bengal_2.jpg", "Bengal"),
        ("images/american_bulldog_10.jpg", "american_bulldog"),
    ]


@pytest.mark.parametrize(("name", "inside"), [("pubfig", ""), ("caltech256", "256_ObjectCategories/")])
def test_folders_of_jpegs_are_classes_and_hidden_ones_and_clutter_are_not(tmp_path, name, inside):
    images = [f"{inside}{image}" for image in ("001.b/1.jpg", "001.b/2.jpg", "002.A/1.jpg")]
    touch(tmp_path, *images, *(f"{inside}{other}" for other in ("001.b/notes.txt", ".thumbs/1.jpg", "002.A/.1.jpg")))
    if inside:
        touch(tmp_path, f"{inside}257.clutter/1.jpg")
    layout = getattr(layouts, name)(tmp_path)
    assert layout.images == tuple(images)
    assert layout.classes == ("001.b", "002.A")
    assert layout.labels.tolist() == [0, 0, 1]
    assert layout.splits == {}
