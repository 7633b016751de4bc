import pytest

from tethertune.errors import DataError
from tethertune.lab import sources


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"'fashon' is not a folder.*Did you mean 'fashion'"):
        sources.find("fashon")
    (tmp_path / "file.zip").write_bytes(b"PK")
    with pytest.raises(
        DataError, match="is not a folder; give a folder of images, hf:NAME, or one of fashion, digits, aircraft"
    ):
        sources.find(str(tmp_path / "file.zip"))


@pytest.mark.parametrize(
    ("given", "meant"), [("aircrafts", "aircraft"), ("pubfig83:/data", "pubfig"), ("digit", "digits")]
)
def test_names_of_data_sets_are_suggested(given, meant):
    with pytest.raises(DataError, match=f"Did you mean '{meant}'"):
        sources.find(given)
