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
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math")
"""Nothing that lets a compiler reorder or drop floating-point operations: the kernels' error bounds count on them."""
_PATIENCE = 120  # seconds for the compiler; it takes three or so

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
    """Compile the sources side by side and link them; the target appears whole or not at all."""
    _log.info("compiling the C kernels with %s (once on this machine, a few seconds)", compiler)
    with tempfile.TemporaryDirectory(prefix=f"{target.stem}-", dir=target.parent) as scratch:
        objects = {str(path): f"{scratch}/{path.stem}.o" for path in sorted(SOURCES.glob("*.c"))}
        _run([[compiler, *flags, "-c", source, "-o", made] for source, made in objects.items()])
        _run([[compiler, "-shared", "-pthread", *objects.values(), "-o", f"{scratch}/whole.so", "-lm"]])
        Path(scratch, "whole.so").replace(target)


def _run(commands: list[list[str]]) -> None:
    """Run commands at the same time, and wait for all."""
    running = []
    try:
        for command in commands:
            running.append(  # noqa: PERF401 - those that have begun must be known when one cannot
                subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # noqa: S603
            )
        for process in running:
            _, said = process.communicate(timeout=_PATIENCE)
            if process.returncode:
                raise CannotCompileError(f"{commands[0][0]} failed: {said.strip()[-500:]}")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompileError(f"{commands[0][0]} failed: {error}") from error
    finally:
        for process in running:
            process.kill()
            process.communicate()
