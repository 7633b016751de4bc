import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
make_fashion = runpy.run_path(str(ROOT / "scripts/make_fashion.py"))

pytestmark = pytest.mark.skipif(
    not make_fashion["SOURCE"].is_dir(), reason="needs Debian's package dataset-fashion-mnist"
)


SPLITS = ("train.png", "validation.png", "test.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two folders that the script has written."""
    folders = [tmp_path_factory.mktemp("made") for _ in range(2)]
    for folder in folders:
        make_fashion["main"](target=folder)
    return folders


@pytest.mark.parametrize("name", SPLITS)
def test_the_embedded_images_are_what_the_script_makes(made, name):
    with Image.open(made[0] / name) as new, Image.open(make_fashion["TARGET"] / name) as embedded:
        assert np.array_equal(np.asarray(new), np.asarray(embedded))


@pytest.mark.parametrize("name", SPLITS)
def test_the_script_makes_the_same_files_again(made, name):
    assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes()
