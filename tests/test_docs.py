import re
import subprocess
import sys
from pathlib import Path

import pytest

import tethertune

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path):
    """As ``make docs`` does: a link, a reference or a docstring that is broken is a warning, and an error here."""
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", tmp_path / "doctrees"]
    done = subprocess.run([*build, ROOT / "docs", tmp_path / "html"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "html" / "reference.html").read_text(encoding="utf-8")
    undocumented = [n for n in tethertune.__all__ if not re.search(rf'id="tethertune\.(\w+\.)?{n}"', reference)]
    assert undocumented == []
