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


@pytest.fixture(scope="session")
def knowing(tmp_path_factory):
    """Weights of a tiny network with a classifier of ten classes that is often confident, and 70 images to ask it."""
    import timm
    import torch
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("knowing")
    random = np.random.default_rng(3)
    for number in range(70):
        folder = root / "images" / ("some" if number % 2 else "others/deeper")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number:02}.png")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = timm.create_model("test_efficientnet", num_classes=10).state_dict()
    state["classifier.weight"] *= 150
    save_file(state, root / "base.safetensors")
    return root


@pytest.fixture
def retaining(tiny, knowing):
    """``retaining(**values)`` configures a tiny run that measures what is forgotten; it forgets some."""

    def configure(**values):
        usual = {"weights": str(knowing / "base.safetensors"), "retain": str(knowing / "images"), "retain_size": 32}
        return tiny(**usual | {"method": "none", "lr": 3e-3, "cache": str(knowing / "cache")} | values)

    return configure
