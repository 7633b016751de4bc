import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def make_images():
    """``make_images(root, {"train/cat": 3})`` writes little images, all different: root/train/cat/00.png to 02.png."""
    random = np.random.default_rng(0)

    def make(root, counts):
        for folder, count in counts.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = random.integers(0, 256, (8, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{number:02}.png")
        return root

    return make


@pytest.fixture
def unprivileged_path():
    """A folder of an ordinary user, whom permissions hold back; root becomes that user for the test."""
    if os.geteuid() != 0:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    nobody = 65534
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, nobody, nobody)
        os.seteuid(nobody)
        try:
            yield Path(folder)
        finally:
            os.seteuid(0)
