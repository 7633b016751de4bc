import numpy as np
import pytest
from PIL import Image

from tethertune.errors import MissingExtraError
from tethertune.lab import sources


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


def test_the_digits_of_scikit_learn():
    source = sources.find("digits")
    counts = {split: np.bincount(source.labels[members]).tolist() for split, members in source.splits.items()}
    assert counts["validation"] == [50] * 10
    assert counts["test"] == [70] * 10
    assert (sum(counts["train"]), min(counts["train"]), max(counts["train"])) == (597, 54, 63)
    assert sorted(np.concatenate(list(source.splits.values()))) == list(range(1797))
    assert source.classes == tuple("0123456789")
    assert (source.root / source.files[0]).is_file()
    assert "seed 0: 50 validation and 70 test images" in source.split


def test_a_digit_is_grey_and_uses_the_whole_range():
    source = sources.digits()
    pixels = np.stack([np.asarray(source.image(index)) for index in range(1797)])
    assert pixels.shape == (1797, 8, 8, 3)
    assert (pixels[..., 0] == pixels[..., 2]).all()
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert source.labels[:4].tolist() == [0, 1, 2, 3]


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setattr("tethertune.lab.sources.embedded.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"scikit-learn: pip install 'tethertune\[lab\]'"):
        sources.find("digits")
