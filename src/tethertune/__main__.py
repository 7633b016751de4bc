"""The program ``tethertune``; also ``python -m tethertune``."""

import sys
from importlib.util import find_spec

__all__ = ["main"]

_NEEDED = ("accelerate", "altair", "cyclopts", "jinja2", "numpy", "PIL", "rich", "timm", "torchvision", "vl_convert")


def main() -> int:
    """Run the command line with the arguments of this process.

    Returns:
        The exit code: 0 done, 1 failed, 2 bad input (or the extra is not installed), 130 interrupted.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        print(  # noqa: T201
            f"The command line needs {', '.join(missing)}: pip install 'tethertune[lab]'", file=sys.stderr
        )
        return 2
    from tethertune.cli import run

    return run()


if __name__ == "__main__":
    sys.exit(main())
