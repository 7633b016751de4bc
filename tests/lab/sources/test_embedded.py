import numpy as np
from PIL import Image

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
