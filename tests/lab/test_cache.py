import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tethertune.errors import DataError
from tethertune.lab import cache, images, sources

COUNTS = {"cat": 3, "dog": 2}


@pytest.fixture
def folder(make_images, tmp_path):
    return make_images(tmp_path / "pets", COUNTS)


def decoded(folder, store, *, size=6, interpolation="bilinear", crop_fraction=1.0):
    source = sources.folder(folder)
    return cache.decoded(
        source,
        cache.fingerprint(source, store),
        size=size,
        interpolation=interpolation,
        crop_fraction=crop_fraction,
        cache=store,
    )


def expected(folder, size=6):
    paths = sorted(folder.rglob("*.png"))
    return np.stack([images.fit(images.read(path), size, Image.Resampling.BILINEAR, 1.0) for path in paths])


def only_file(store):
    (path,) = (store / "images").iterdir()
    return path


def test_images_are_decoded_into_a_read_only_map(folder, tmp_path):
    result = decoded(folder, tmp_path / "cache")
    assert result.shape == (5, 6, 6, 3)
    assert np.array_equal(result, expected(folder))
    assert isinstance(result, np.memmap)
    assert not result.flags.writeable
    assert only_file(tmp_path / "cache").stat().st_size == result.size + 4


def test_the_order_holds_over_many_blocks(tmp_path):
    for number in range(600):
        (tmp_path / f"pets/{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), (number // 256, number % 256, 7)).save(tmp_path / f"pets/{number % 2}/{number:03}.bmp")
    result = decoded(tmp_path / "pets", tmp_path / "cache", size=1)
    numbers = result[:, 0, 0, 0].astype(int) * 256 + result[:, 0, 0, 1]
    assert numbers.tolist() == [*range(0, 600, 2), *range(1, 600, 2)]


def test_a_second_call_opens_what_is_there(folder, tmp_path):
    decoded(folder, tmp_path / "cache")
    before = only_file(tmp_path / "cache").stat()
    assert np.array_equal(decoded(folder, tmp_path / "cache"), expected(folder))
    after = only_file(tmp_path / "cache").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_every_setting_has_its_own_file(folder, tmp_path):
    settings = [{}, {"size": 7}, {"interpolation": "nearest"}, {"crop_fraction": 0.9}, {"crop_fraction": None}]
    for setting in settings:
        decoded(folder, tmp_path / "cache", **setting)
    assert len(list((tmp_path / "cache/images").iterdir())) == len(settings)


def test_equal_images_elsewhere_share_the_file(folder, tmp_path):
    for path in folder.rglob("*.png"):
        copy = tmp_path / "copy" / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    decoded(folder, tmp_path / "cache")
    decoded(tmp_path / "copy", tmp_path / "cache")
    assert only_file(tmp_path / "cache")


@pytest.mark.parametrize("restore_time", [True, False])
def test_a_changed_image_is_noticed(folder, tmp_path, restore_time):
    decoded(folder, tmp_path / "cache")
    before = (folder / "cat/00.png").stat()
    Image.new("RGB", (8, 10)).save(folder / "cat/00.png")
    if restore_time:
        os.utime(folder / "cat/00.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not decoded(folder, tmp_path / "cache")[0].any()


def test_the_fingerprint_is_of_names_and_contents(folder, tmp_path):
    def fingerprint():
        return cache.fingerprint(sources.folder(folder), tmp_path / "cache")

    first = fingerprint()
    assert first.startswith("sha256:")
    assert len(first) == len("sha256:") + 64
    (folder / "cat/00.png").touch()
    assert fingerprint() == first
    (folder / "cat/00.png").rename(folder / "cat/zz.png")
    renamed = fingerprint()
    assert renamed != first
    (folder / "cat/zz.png").write_bytes((folder / "cat/zz.png").read_bytes() + b"\0")
    assert fingerprint() not in {first, renamed}


@pytest.mark.parametrize("contents", [b"", b"sha256:12", b"\xff" * 71])
def test_a_damaged_fingerprint_is_made_again(folder, tmp_path, contents):
    source = sources.folder(folder)
    right = cache.fingerprint(source, tmp_path / "cache")
    (remembered,) = (tmp_path / "cache/fingerprints").iterdir()
    remembered.write_bytes(contents)
    assert cache.fingerprint(source, tmp_path / "cache") == right == remembered.read_text()


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    contents = bytearray(path.read_bytes())
    contents[200] ^= 1
    path.write_bytes(contents)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lengthen, empty])
def test_a_damaged_cache_is_noticed_and_made_again(folder, tmp_path, caplog, damage):
    decoded(folder, tmp_path / "cache")
    path = only_file(tmp_path / "cache")
    damage(path)
    assert np.array_equal(decoded(folder, tmp_path / "cache"), expected(folder))
    assert f"{path} is damaged" in caplog.text
    caplog.clear()
    decoded(folder, tmp_path / "cache")
    assert not caplog.text


def test_a_broken_image_is_named_and_leaves_no_cache(folder, tmp_path):
    (folder / "dog/01.png").write_bytes((folder / "dog/01.png").read_bytes()[:60])
    with pytest.raises(DataError, match=r"dog/01\.png"):
        decoded(folder, tmp_path / "cache")
    assert list((tmp_path / "cache/images").iterdir()) == []


def test_processes_may_make_one_cache_at_once(folder, tmp_path):
    program = f"""
from pathlib import Path
from tethertune.lab import cache, sources
source, store = sources.folder(Path({str(folder)!r})), Path({str(tmp_path / "cache")!r})
print("ready", flush=True)
input()
for size in range(1, 30):
    images = cache.decoded(source, cache.fingerprint(source, store), size=size, interpolation="bilinear",
                           crop_fraction=1.0, cache=store)
    print(images.sum())
"""
    command = [sys.executable, "-c", program]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    printed = [racer.communicate() for racer in racers]
    sums = "".join(f"{expected(folder, size).sum()}\n" for size in range(1, 30))
    assert printed == [(sums, "")] * 3
    assert len(list((tmp_path / "cache/images").iterdir())) == 29


def test_a_cache_that_cannot_be_written_says_what_to_do(make_images, unprivileged_path):
    folder = make_images(unprivileged_path / "pets", COUNTS)
    store = unprivileged_path / "cache"
    store.mkdir()
    store.chmod(0o500)
    with pytest.raises(DataError, match=r"cache: Permission denied.*--cache"):
        decoded(folder, store)


def test_a_full_read_only_cache_is_good_enough(make_images, unprivileged_path):
    folder = make_images(unprivileged_path / "pets", COUNTS)
    store = unprivileged_path / "cache"
    decoded(folder, store)
    for inside in (store / "images", store / "fingerprints", store):
        inside.chmod(0o500)
    assert np.array_equal(decoded(folder, store), expected(folder))
    for inside in (store, store / "images", store / "fingerprints"):
        inside.chmod(0o700)


def test_a_file_in_the_place_of_the_cache_says_what_to_do(folder, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(DataError, match=r"cache: (Not a directory|File exists).*--cache"):
        decoded(folder, tmp_path / "cache")


def test_no_room_for_the_cache_says_what_to_do_and_leaves_nothing(folder, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DataError, match=r"cache: File too large.*--cache.*has room"):
            decoded(folder, tmp_path / "cache", size=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "cache/images").iterdir()) == []


def test_an_unreadable_image_is_named(make_images, unprivileged_path):
    folder = make_images(unprivileged_path / "pets", COUNTS)
    (folder / "dog/00.png").chmod(0)
    with pytest.raises(DataError, match=r"dog/00\.png: Permission denied"):
        decoded(folder, unprivileged_path / "cache")


def test_an_image_that_is_gone_is_named(folder, tmp_path):
    (folder / "dog/zz.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match=r"dog/zz\.png: No such file"):
        decoded(folder, tmp_path / "cache")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "tethertune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / ".cache/tethertune"
