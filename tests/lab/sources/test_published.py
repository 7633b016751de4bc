import dataclasses
import functools
import hashlib
import logging
import shutil
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from tethertune.errors import DataError
from tethertune.lab import sources
from tethertune.lab.sources import published

WITH_LISTS = ("aircraft", "butterfly", "flowers", "dtd")
DRAWN = ("pets", "pubfig", "caltech256")
PAPER = {
    "aircraft": (3334, 3333, 3333, 100),
    "butterfly": (5135, 5135, 15009, 200),
    "flowers": (1020, 1020, 6149, 102),
    "pets": (2000, 2000, 3390, 37),
    "pubfig": (10518, 1660, 1660, 83),
}


@pytest.fixture
def root(make_published, tmp_path):
    make_published(tmp_path / "data")
    return tmp_path / "data"


def test_sizes_are_those_of_table_1():
    for name, figures in PAPER.items():
        entry = published.PUBLISHED[name]
        assert (*entry.sizes.values(), entry.classes) == figures
        assert list(entry.sizes) == ["train", "validation", "test"]
    assert set(published.PUBLISHED) == {*WITH_LISTS, *DRAWN}


def test_the_page_of_data_sets_says_what_the_code_says():
    page = (Path(__file__).parents[3] / "docs/data-sets.md").read_text(encoding="utf-8")
    rows = {row.split("|")[1].strip(" `"): row for row in page.splitlines() if row.startswith("| `")}
    for name, entry in published.PUBLISHED.items():
        sizes = " / ".join(f"{size:,}" for size in entry.sizes.values())
        got = "downloaded" if entry.torchvision else "by hand"
        for fact in (f"{sum(entry.sizes.values()):,}", str(entry.classes), sizes, entry.url, entry.citation, got):
            assert fact in rows[name]


@pytest.mark.parametrize("name", WITH_LISTS)
def test_small_copies_with_lists(root, name, caplog):
    source = sources.find(f"{name}:{root / name}")
    assert source.name == name
    assert len(source.classes) == 3
    counts = {split: np.bincount(source.labels[members]).tolist() for split, members in source.splits.items()}
    assert counts == {"train": [2, 2, 2], "validation": [2, 2, 2], "test": [2, 2, 2]}
    assert sorted(np.concatenate(list(source.splits.values()))) == list(range(18))
    assert source.split.startswith("a small copy with 18 of ")
    assert "the data set's own" in source.split
    assert "is a small copy of 18 of " in caplog.text


@pytest.mark.parametrize("name", DRAWN)
def test_small_copies_without_lists_are_split_alike_every_time(root, name):
    source = sources.find(f"{name}:{root / name}")
    counts = {split: np.bincount(source.labels[members]).tolist() for split, members in source.splits.items()}
    assert counts == {"train": [4, 4, 4], "validation": [1, 1, 1], "test": [1, 1, 1]}
    again = sources.find(f"{name}:{root / name}")
    assert all(np.array_equal(source.splits[split], again.splits[split]) for split in counts)
    assert "15 % of each class held out with seed 0" in source.split


@pytest.mark.parametrize("name", [*WITH_LISTS, *DRAWN])
def test_labels_belong_to_their_images(root, name):
    source = sources.find(f"{name}:{root / name}")
    for index, label in enumerate(source.labels):
        assert np.asarray(source.image(index)).mean(axis=(0, 1)).argmax() == label


@pytest.mark.parametrize("name", [*WITH_LISTS, *DRAWN])
def test_all_that_decides_a_label_is_in_the_fingerprint(root, name):
    source = sources.find(f"{name}:{root / name}")
    on_disk = {path.relative_to(source.root).as_posix() for path in source.root.rglob("*") if path.is_file()}
    unused = {Path(file).name for file in on_disk - {*source.files} if ".clutter" not in file}
    assert unused <= {"small-copy.txt", "images_variant_trainval.txt", "trainval.txt", "test.txt"}


@pytest.mark.parametrize("name", [*WITH_LISTS, *DRAWN])
def test_where_a_data_set_is_looked_for(root, name, monkeypatch):
    monkeypatch.setenv("TETHERTUNE_DATA", str(root))
    assert published.folder(name) == root / name
    assert len(sources.find(name).labels) == 18
    monkeypatch.delenv("TETHERTUNE_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root))
    assert published.folder(name) == root / "tethertune" / "data" / name


@pytest.mark.parametrize(
    ("name", "inside"),
    [("aircraft", "fgvc-aircraft-2013b"), ("butterfly", "Butterfly200"), ("pubfig", "pubfig83"), ("dtd", "dtd")],
)
def test_the_folder_inside_may_be_given(root, name, inside):
    (root / name / "small-copy.txt").rename(root / name / inside / "small-copy.txt")
    assert len(sources.find(f"{name}:{root / name / inside}").labels) == 18


def test_classes_have_the_names_of_the_data_set(root):
    def classes(name):
        return sources.find(f"{name}:{root / name}").classes

    assert classes("aircraft") == ("707-320", "A340-600", "Boeing 737-700")
    assert classes("butterfly") == ("001.Achillides_bianor", "002.Papilio_xuthus", "003.Danaus_chrysippus")
    assert classes("flowers") == ("pink primrose", "hard-leaved pocket orchid", "canterbury bells")
    assert classes("pets") == ("Abyssinian", "american_bulldog", "Egyptian_Mau")
    assert classes("pubfig") == ("Adam Sandler", "Adriana Lima", "Alec Baldwin")
    assert classes("caltech256") == ("001.ak47", "002.american-flag", "003.backpack")
    assert classes("dtd") == ("banded", "dotted", "zigzagged")


@pytest.mark.parametrize("name", [*WITH_LISTS, *DRAWN])
def test_a_wrong_total_is_refused_unless_the_copy_says_that_it_is_small(root, name):
    (root / name / "small-copy.txt").unlink()
    if name == "flowers":
        message = "wrong checksum"
    else:
        entry = published.PUBLISHED[name]
        message = f"18 images of 3 classes, the published set {sum(entry.sizes.values()):,} of {entry.classes}: an extr"
    with pytest.raises(DataError, match=f"{message}.* a file small-copy"):
        sources.find(f"{name}:{root / name}")


def test_a_whole_data_set_is_split_by_its_own_lists(root, monkeypatch):
    (root / "aircraft/small-copy.txt").unlink()

    def find(*sizes):
        published_sizes = dict(zip(("train", "validation", "test"), sizes, strict=True))
        entry = dataclasses.replace(published.PUBLISHED["aircraft"], sizes=published_sizes, classes=3)
        monkeypatch.setitem(published.PUBLISHED, "aircraft", entry)
        return sources.find(f"aircraft:{root / 'aircraft'}")

    source = find(6, 6, 6)
    assert source.split == "the data set's own lists images_variant_train, _val and _test"
    assert [len(members) for members in source.splits.values()] == [6, 6, 6]
    with pytest.raises(DataError, match=r"is split into .*6.* not .*7.* fetch it again"):
        find(7, 5, 6)


@pytest.mark.parametrize("name", ["pets", "pubfig", "caltech256"])
def test_a_whole_data_set_is_drawn_in_the_sizes_of_the_paper(name):
    """Every class has the smallest number of images that its sum allows, and one class the rest."""
    entry = published.PUBLISHED[name]
    total = sum(entry.sizes.values())
    counts = np.full(entry.classes, total // entry.classes)
    counts[:5] -= 30
    counts[-1] += total - counts.sum()
    labels = np.repeat(np.arange(entry.classes), counts)
    members = entry.draw(labels)
    assert {split: len(members[split]) for split in entry.sizes} == entry.sizes
    assert sorted(np.concatenate(list(members.values()))) == list(range(total))
    assert all(len(set(labels[of_split])) == entry.classes for of_split in members.values())


def test_a_whole_data_set(tmp_path, monkeypatch):
    """A PubFig83 in which each image is a link to one of 83: the number of files and folders is what counts."""
    for person in range(83):
        folder = tmp_path / "pubfig83" / f"{person:02}"
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4), (person, 0, 0)).save(folder / "0.jpg")
        for number in range(1, 167 if person < 60 else 166):
            (folder / f"{number}.jpg").hardlink_to(folder / "0.jpg")
    monkeypatch.setenv("TETHERTUNE_DATA", str(tmp_path.parent))
    source = sources.find(f"pubfig:{tmp_path}")
    assert {split: len(members) for split, members in source.splits.items()} == {
        "train": 10518,
        "validation": 1660,
        "test": 1660,
    }
    assert np.bincount(source.labels[source.splits["test"]]).tolist() == [20] * 83
    assert "20 validation and 20 test images of each person" in source.split
    (tmp_path / "pubfig83/07/9.jpg").unlink()
    with pytest.raises(DataError, match="has 13,837 images of 83 classes, the published set 13,838 of 83"):
        sources.find(f"pubfig:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "list_"),
    [
        ("aircraft", "fgvc-aircraft-2013b/data/variants.txt"),
        ("aircraft", "fgvc-aircraft-2013b/data/images_variant_val.txt"),
        ("butterfly", "Butterfly200/Butterfly200_train_release.txt"),
        ("butterfly", "Butterfly200/Butterfly200_test_release.txt"),
        ("flowers", "flowers-102/imagelabels.mat"),
        ("flowers", "flowers-102/setid.mat"),
        ("pets", "oxford-iiit-pet/annotations/list.txt"),
        ("dtd", "dtd/labels/test1.txt"),
    ],
)
def test_a_missing_list_is_named(root, name, list_):
    (root / name / list_).unlink()
    with pytest.raises(DataError, match=Path(list_).name):
        sources.find(f"{name}:{root / name}")


@pytest.mark.parametrize(
    ("name", "image", "list_"),
    [
        ("aircraft", "fgvc-aircraft-2013b/data/images/1000003.jpg", "images_variant_val.txt"),
        ("butterfly", "Butterfly200/images/002.Papilio_xuthus/006.jpg", "Butterfly200_test_release.txt"),
        ("flowers", "flowers-102/jpg/image_00001.jpg", "setid.mat"),
        ("pets", "oxford-iiit-pet/images/Egyptian_Mau_2.jpg", "list.txt"),
        ("dtd", "dtd/images/banded/banded_0001.jpg", "train1.txt"),
    ],
)
def test_a_listed_image_that_is_not_there_is_named(root, name, image, list_):
    (root / name / image).unlink()
    with pytest.raises(DataError, match=f"{list_} in .* names .*{Path(image).name}, which is not there \\(1 such"):
        sources.find(f"{name}:{root / name}")


def test_lists_that_do_not_go_together(root):
    (root / "aircraft/fgvc-aircraft-2013b/data/variants.txt").write_text("707-320\nA340-600\n")
    with pytest.raises(DataError, match=r"images_variant_train.txt .* of the unknown class 'Boeing 737-700'"):
        sources.find(f"aircraft:{root / 'aircraft'}")


def test_a_list_that_is_no_text(root):
    (root / "dtd/dtd/labels/val1.txt").write_bytes(b"banded/\xff\xfe")
    with pytest.raises(DataError, match=r"val1.txt cannot be read \(.*: fetch it again"):
        sources.find(f"dtd:{root / 'dtd'}")


def test_pets_without_their_images(root):
    (root / "pets/oxford-iiit-pet/images").rename(root / "elsewhere")
    with pytest.raises(DataError, match=r"images is missing: the download or its unpacking was cut off"):
        sources.find(f"pets:{root / 'pets'}")


def test_a_damaged_matlab_file(root):
    (root / "flowers/flowers-102/imagelabels.mat").write_bytes(b"MATLAB 5.0" + bytes(300))
    with pytest.raises(DataError, match=r"imagelabels.mat cannot be read as a Matlab file with labels"):
        sources.find(f"flowers:{root / 'flowers'}")


def test_labels_and_splits_of_other_flowers(root, tmp_path, make_published):
    make_published(tmp_path / "more", per_class=9)
    (tmp_path / "more/flowers/flowers-102/setid.mat").replace(root / "flowers/flowers-102/setid.mat")
    with pytest.raises(DataError, match=r"imagelabels.mat and setid.mat in .* do not go together"):
        sources.find(f"flowers:{root / 'flowers'}")


@pytest.mark.parametrize("name", ["butterfly", "pubfig"])
def test_what_cannot_be_downloaded_says_where_it_is_to_be_had(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TETHERTUNE_DATA", str(tmp_path))
    entry = published.PUBLISHED[name]
    with pytest.raises(DataError, match=f"{name} .* is not in .* Fetch it from {entry.url} and unpack it so that .*"):
        sources.find(name)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"aircraft:.*nowhere is not a folder"):
        sources.find(f"aircraft:{tmp_path / 'nowhere'}")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder whose files a server on this machine gives out, and its address; and an empty place for data sets."""
    (tmp_path / "served").mkdir()
    handler = functools.partial(_Quiet, directory=tmp_path / "served")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TETHERTUNE_DATA", str(tmp_path / "downloaded"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield tmp_path / "served", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def archive(root, served, monkeypatch):
    """An archive of the small Aircraft where torchvision looks for the real one."""
    folder, address = served
    with tarfile.open(folder / "aircraft.tar.gz", "w:gz") as file:
        file.add(root / "aircraft/small-copy.txt", "small-copy.txt")
        file.add(root / "aircraft/fgvc-aircraft-2013b", "fgvc-aircraft-2013b")
    monkeypatch.setattr(torchvision.datasets.FGVCAircraft, "_URL", f"{address}/aircraft.tar.gz")
    return folder / "aircraft.tar.gz"


@pytest.mark.usefixtures("archive")
def test_a_download_is_unpacked_and_its_archive_removed(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(sources.find("aircraft").labels) == 18
    assert "downloading aircraft from https://www.robots.ox.ac.uk" in caplog.text
    assert {path.name for path in (tmp_path / "downloaded/aircraft").iterdir()} == {
        "small-copy.txt",
        "fgvc-aircraft-2013b",
    }
    assert [path.name for path in (tmp_path / "downloaded").iterdir()] == ["aircraft"]


@pytest.mark.usefixtures("archive")
def test_another_process_may_be_faster(root, tmp_path, monkeypatch):
    class Slow(torchvision.datasets.FGVCAircraft):
        def _download(self):
            super()._download()
            shutil.copytree(root / "aircraft", tmp_path / "downloaded/aircraft")

    monkeypatch.setattr(torchvision.datasets, "FGVCAircraft", Slow)
    assert len(sources.find("aircraft").labels) == 18
    assert [path.name for path in (tmp_path / "downloaded").iterdir()] == ["aircraft"]


def test_an_archive_that_was_cut_off_leaves_nothing(archive, tmp_path):
    archive.write_bytes(archive.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"aircraft could not be downloaded \(the archive .* is cut off or damaged"):
        sources.find("aircraft")
    assert list((tmp_path / "downloaded").iterdir()) == []


def test_without_a_network_the_message_says_what_to_do(archive, tmp_path):
    archive.unlink()
    with pytest.raises(DataError, match=r"aircraft could not be downloaded .*not found.* Fetch it from https://www"):
        sources.find("aircraft")
    assert list((tmp_path / "downloaded").iterdir()) == []


def test_an_archive_with_the_wrong_checksum(served, monkeypatch):
    folder, address = served
    (folder / "dtd.tar.gz").write_bytes(b"something else")
    monkeypatch.setattr(torchvision.datasets.DTD, "_URL", f"{address}/dtd.tar.gz")
    with pytest.raises(DataError, match=r"dtd could not be downloaded \(the file that arrived has the wrong checksum"):
        sources.find("dtd")


def test_checksums_are_those_of_torchvision():
    theirs = {name: md5 for name, md5 in torchvision.datasets.Flowers102._file_dict.values() if name.endswith(".mat")}
    assert published.PUBLISHED["flowers"].md5 == theirs


def test_right_checksums_are_let_pass(root, monkeypatch):
    base = root / "flowers/flowers-102"
    right = {name: hashlib.md5((base / name).read_bytes()).hexdigest() for name in ("imagelabels.mat", "setid.mat")}
    entry = dataclasses.replace(published.PUBLISHED["flowers"], md5=right)
    monkeypatch.setitem(published.PUBLISHED, "flowers", entry)
    (root / "flowers/small-copy.txt").unlink()
    with pytest.raises(DataError, match="18 images of 3 classes, the published set 8,189 of 102"):
        sources.find(f"flowers:{root / 'flowers'}")
