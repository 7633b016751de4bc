"""Link the photographs of Debian's package ``tuxpaint-stamps-default`` into one folder, for ``--retain``.

Usage: ``python scripts/make_retention_folder.py [SOURCE [TARGET]]``

Of the package's PNG files those in folders called ``cartoon`` or ``symbols`` are left out, and all drawings in SVG:
what stays are 439 pictures of animals, plants, food, tools, vehicles and the like, which ImageNet's classes cover well.
"""

import sys
from pathlib import Path

SOURCE = Path("/usr/share/tuxpaint/stamps")
TARGET = Path("stamps")
LEFT_OUT = {"cartoon", "symbols"}


def photographs(source: Path) -> list[Path]:
    """The pictures that are taken, relative to the source, sorted."""
    found = (path.relative_to(source) for path in source.rglob("*.png"))
    return sorted(path for path in found if LEFT_OUT.isdisjoint(path.parts))


def main(source: Path = SOURCE, target: Path = TARGET) -> None:
    """Make the folder, with a symbolic link for each picture, in the source's subfolders."""
    taken = photographs(source)
    for path in taken:
        link = target / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to((source / path).resolve())
    print(f"{target}: {len(taken)} pictures")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
