import pytest

from tethertune.errors import DataError
from tethertune.lab import sources


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"'fashon' is not a folder.*Did you mean 'fashion'"):
        sources.find("fashon")
    (tmp_path / "file.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="is not a folder; give 'fashion', 'digits' or a folder of images"):
        sources.find(str(tmp_path / "file.zip"))
