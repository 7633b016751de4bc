import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """``benchmark("step")`` is the module ``benchmarks/step.py``, which finds those beside it as when it is run."""

    def load(name):
        monkeypatch.syspath_prepend(FOLDER)
        return importlib.import_module(name)

    return load
