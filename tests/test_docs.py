import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PUBLIC = [
    "tethertune",
    "tethertune.errors",
    "tethertune.integrations.lightning",
    "tethertune.integrations.pytorch_lightning",
    "tethertune.integrations.transformers",
    "tethertune.norms",
    "tethertune.optim",
    "tethertune.projections",
    "tethertune.theory",
]
"""The modules whose every public name has its place in the reference."""


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path):
    """As ``make docs`` does: a link, a reference or a docstring that is broken is a warning, and an error here."""
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", tmp_path / "doctrees"]
    done = subprocess.run([*build, ROOT / "docs", tmp_path / "html"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "html" / "reference.html").read_text(encoding="utf-8")
    undocumented = [
        f"{module}.{name}"
        for module in PUBLIC
        for name in import_module(module).__all__
        if not re.search(rf'id="(module-)?tethertune\.([\w.]+\.)?{name}"', reference)
    ]
    assert undocumented == [], undocumented
