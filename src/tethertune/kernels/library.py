"""The C kernels as a shared library: compiled once on this machine by the compiler it has, then loaded from a cache.

The sources in ``kernels/c`` are plain C11 of a few hundred lines that include nothing of Python's or torch's, so that
compiling takes a few seconds and installing the package needs no compiler. They are compiled for the very processor
that runs them, into ``$XDG_CACHE_HOME/tethertune/kernels`` under a name that tells sources, flags, compiler and
processor apart; a process that finds the file there only loads it.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["CannotCompileError", "load"]

SOURCES = Path(__file__).parent / "c"
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-fno-trapping-math")
"""Nothing that lets a compiler reorder or drop floating-point operations: the kernels' error bounds count on them."""
_PATIENCE = 120  # seconds for the compiler; it takes about five on one core

_log = logging.getLogger("tethertune")


class CannotCompileError(Exception):
    """Why there is no library: no compiler, or what it said. Caught where a backend is chosen."""


@functools.cache
def load() -> ctypes.CDLL:
    """The library; compiled now if this machine has not done so before.

    Raises:
        CannotCompileError: There is no C compiler, or it fails.
    """
    if platform.system() == "Windows":
        raise CannotCompileError("the C kernels are for Linux and macOS")
    compiler = _compiler()
    flags = (*FLAGS, "-mcpu=native" if platform.machine() in {"arm64", "aarch64"} else "-march=native")
    target = _folder() / f"{_fingerprint(compiler, flags)}.so"
    if not target.exists():
        _compile(compiler, flags, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise CannotCompileError(f"{target} cannot be loaded: {error}") from error


def _compiler() -> str:
    """$CC, or the first of the usual names that is there."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise CannotCompileError("no C compiler was found (cc, gcc, clang, or $CC)")


def _folder() -> Path:
    """The cache's folder; a temporary one where the user's cannot be written."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "tethertune" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="tethertune-kernels-"))


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.read_bytes())
    status = Path(compiler).resolve().stat()
    digest.update(repr((flags, str(Path(compiler).resolve()), status.st_size, status.st_mtime_ns)).encode())
    digest.update(_processor().encode())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """What tells processors with different instructions apart; a home folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    about = dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
    return "\n".join((platform.machine(), *about))


def _compile(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    _log.info("compiling the C kernels with %s (once on this machine, a few seconds)", compiler)
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    command = [compiler, *flags, *sources, "-o", str(temporary), "-lm"]
    try:
        done = subprocess.run(  # noqa: S603 - the compiler that the user has
            command, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompileError(f"{compiler} failed: {error}") from error
    if done.returncode:
        raise CannotCompileError(f"{compiler} failed: {done.stderr.strip()[-500:]}")
    temporary.replace(target)
