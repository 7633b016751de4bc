import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

from tethertune import theory

torch.set_num_threads(1)
PAGE = Path(__file__).parents[2] / "docs" / "theory.md"
MODULES = [module.name for module in pkgutil.iter_modules(theory.__path__, "tethertune.theory.")]


def test_the_page_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    example = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, PAGE.name, str(PAGE), 0)
    assert len(example.examples) > 30
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_public_name_is_exported_and_documented():
    assert list(theory.__all__) == sorted(theory.__all__)
    for name in theory.__all__:
        assert getattr(theory, name).__doc__, name
