import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
script = runpy.run_path(str(ROOT / "scripts/release_notes.py"))

CHANGELOG = """# Changelog

## [Unreleased]

## [0.2.0] - 2026-12-01

### Added

- Export.

## [0.1.0] - 2026-11-23

- The first.
"""


def test_what_is_said_of_a_version():
    assert script["section"](CHANGELOG, "0.2.0") == "### Added\n\n- Export."
    assert script["section"](CHANGELOG, "0.1.0") == "- The first."
    assert script["section"](CHANGELOG, "0.1") == script["section"](CHANGELOG, "Unreleased") == ""


def test_a_release_that_agrees():
    assert script["fault"]("v0.2.0", "0.2.0", "0.2.0", CHANGELOG) is None


@pytest.mark.parametrize(
    ("tag", "version", "imported", "changelog", "sentence"),
    [
        ("v0.2.0", "0.2.0", "0.1.0", CHANGELOG, "pyproject.toml says 0.2.0 and tethertune.__version__ says 0.1.0"),
        ("0.2.0", "0.2.0", "0.2.0", CHANGELOG, "The tag 0.2.0 is not v0.2.0"),
        ("v0.3.0", "0.3.0", "0.3.0", CHANGELOG, "nothing to say under '## [0.3.0] - DATE'"),
        ("v0.2.0", "0.2.0", "0.2.0", CHANGELOG.replace(" - 2026-12-01", ""), "nothing to say under '## [0.2.0]"),
        ("v0.2.0", "0.2.0", "0.2.0", CHANGELOG.replace("sed]\n", "sed]\n\n- More.\n"), "has changes under Unreleased"),
    ],
)
def test_what_disagrees(tag, version, imported, changelog, sentence):
    assert sentence in script["fault"](tag, version, imported, changelog)


def test_this_repository_prints_the_notes_of_a_version_or_says_why_not(capsys):
    with pytest.raises(SystemExit, match=r"The tag v0.0.0 is not v\d"):
        script["main"]("v0.0.0")
    assert capsys.readouterr().out == ""
