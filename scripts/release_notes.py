"""Print what the changelog says of a release, if the tag, the package and the changelog agree on its version.

Usage: ``python scripts/release_notes.py TAG``, with the tag ``vX.Y.Z``. Needs the standard library alone. Exits with 1
and says why where they disagree: the release workflow runs it before anything is built.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def fault(tag: str, version: str, imported: str, changelog: str) -> str | None:
    """What disagrees, as a sentence; ``None`` if nothing does.

    Args:
        tag: The tag.
        version: That of ``pyproject.toml``.
        imported: ``tethertune.__version__``.
        changelog: The text of ``CHANGELOG.md``.
    """
    if version != imported:
        return f"pyproject.toml says {version} and tethertune.__version__ says {imported}."
    if tag != f"v{version}":
        return f"The tag {tag} is not v{version}, the version of the package."
    if not section(changelog, version):
        return f"CHANGELOG.md has nothing to say under '## [{version}] - DATE'."
    if section(changelog, "Unreleased"):
        return f"CHANGELOG.md has changes under Unreleased: move them to {version}."
    return None


def section(changelog: str, version: str) -> str:
    """The text under a version's heading, which has a date unless it is Unreleased; empty without it."""
    date = "" if version == "Unreleased" else r" - \d{4}-\d\d-\d\d"
    found = re.search(rf"^## \[{re.escape(version)}\]{date}\n(.*?)(?=^## |\Z)", changelog, re.DOTALL | re.MULTILINE)
    return found[1].strip() if found else ""


def main(tag: str) -> None:
    """Print the section of the release that the tag names."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    source = (ROOT / "src/tethertune/__init__.py").read_text(encoding="utf-8")
    (imported,) = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if wrong := fault(tag, version, imported, changelog):
        sys.exit(wrong)
    print(section(changelog, version))


if __name__ == "__main__":
    main(*sys.argv[1:])
