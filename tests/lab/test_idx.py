import gzip

import numpy as np
import pytest

from tethertune.errors import DataError
from tethertune.lab import idx

VALUES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def write(path, values):
    header = bytes((0, 0, 8, values.ndim)) + b"".join(length.to_bytes(4, "big") for length in values.shape)
    content = header + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_an_array_comes_back(tmp_path, name):
    path = write(tmp_path / name, VALUES)
    np.testing.assert_array_equal(idx.read(path, 3), VALUES)
    assert idx.locate(tmp_path, "images") == path


def test_nothing_is_located_in_an_empty_folder(tmp_path):
    assert idx.locate(tmp_path, "images") is None


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda content: content[:-1], "says it holds 24 values and holds 23"),
        (lambda content: content + b"\0", "says it holds 24 values and holds 25"),
        (lambda content: b"\0\0\x0d\3" + content[4:], "no idx file of bytes with 3 axes"),
        (lambda content: content[:9], "no idx file of bytes with 3 axes"),
        (lambda content: content[:0], "no idx file of bytes with 3 axes"),
    ],
)
def test_other_content_is_refused_by_name(tmp_path, spoil, words):
    path = write(tmp_path / "images", VALUES)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=f"images.* {words}"):
        idx.read(path, 3)


@pytest.mark.parametrize("spoil", [lambda content: content[:-9], lambda content: b"no gzip" + content])
def test_a_damaged_gzip_is_refused(tmp_path, spoil):
    path = write(tmp_path / "images.gz", VALUES)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match="Fetch the file again"):
        idx.read(path, 3)
