"""Files that are whole or absent: written to a temporary name, synced, then renamed.

A process killed at any moment leaves either the old file or the new one under the real name, and at worst a stray
temporary file, which :func:`remove_strays` deletes.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["atomic_path", "remove_strays", "write_json", "write_text"]

_PREFIX = ".tmp-"


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the block ends without an error.

    The block writes a file, or creates a folder and fills it. Both are synced to the disk before the rename, and the
    parent folder after it. An existing file is replaced; an existing folder must be empty. On an error ``path`` is as
    it was and nothing temporary stays. The temporary name ends like the real one, for writers that choose the format
    by the suffix, and is unique, for processes that race for one name.

    Raises:
        OSError: The parent folder cannot be created or written, or the disk is full; it names ``path``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_path(Path(folder) / "answer.txt") as temporary:
        ...         _ = temporary.write_text("42")
        ...     (Path(folder) / "answer.txt").read_text()
        '42'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_PREFIX}{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)  # noqa: PTH105 - the system call itself: the one moment that matters
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    _sync_entry(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write an indented JSON document atomically.

    Raises:
        ValueError: The value holds a NaN or an infinity, which JSON has no word for.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def remove_strays(folder: Path) -> None:
    """Delete what killed processes left in a folder that no other process writes to."""
    for stray in folder.glob(f"{_PREFIX}*"):
        _remove(stray)


def _sync(path: Path) -> None:
    """Flush a file, or a folder and all it holds, to the disk."""
    if path.is_dir():
        for inside in path.iterdir():
            _sync(inside)
    _sync_entry(path)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
