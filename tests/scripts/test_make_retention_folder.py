import runpy
from pathlib import Path

import pytest

from tethertune.lab import sources

ROOT = Path(__file__).parents[2]
script = runpy.run_path(str(ROOT / "scripts/make_retention_folder.py"))


def test_drawings_and_symbols_are_left_out(tmp_path, capsys):
    taken = ("animals/birds/00.png", "animals/birds/01.png", "town/00.png")
    for name in (*taken, "animals/birds/cartoon/00.png", "symbols/money/00.png", "town/house.svg"):
        path = tmp_path / "from" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for _ in range(2):  # it can be run again
        script["main"](tmp_path / "from", tmp_path / "to")
    found = sources.unlabelled(tmp_path / "to")
    assert found.files == taken
    assert (tmp_path / "to" / "town" / "00.png").resolve() == (tmp_path / "from" / "town" / "00.png").resolve()
    assert "3 pictures" in capsys.readouterr().out


@pytest.mark.skipif(not script["SOURCE"].is_dir(), reason="needs Debian's package tuxpaint-stamps-default")
def test_the_package_holds_439_photographs():
    assert len(script["photographs"](script["SOURCE"])) == 439
