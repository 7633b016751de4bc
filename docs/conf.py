"""How Sphinx builds this documentation: `make docs`."""

import sys
from pathlib import Path

import tethertune

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "tethertune"
author = "The tethertune developers"
release = tethertune.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
    "pictures",
]
myst_enable_extensions = ["dollarmath", "deflist"]
html_theme = "furo"
html_title = "tethertune"
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True}
