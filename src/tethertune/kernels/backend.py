"""Which kernels project weights on a device: ``triton`` (CUDA), ``native`` (C, on a CPU) or ``chunked`` (PyTorch).

The first that the device and the machine have is taken. ``TETHERTUNE_BACKEND`` forces one; where that one cannot run,
it is an error that says why.
"""

import functools
import logging
import os
from importlib.util import find_spec

import torch

from tethertune.errors import ConfigurationError, did_you_mean
from tethertune.kernels import library

__all__ = ["BACKENDS", "choose", "forced"]

BACKENDS = ("triton", "native", "chunked")

_log = logging.getLogger("tethertune")


def forced() -> str | None:
    """What ``TETHERTUNE_BACKEND`` asks for; ``None`` if nothing.

    Raises:
        ConfigurationError: It names no backend.
    """
    name = os.environ.get("TETHERTUNE_BACKEND") or None
    if name not in (None, *BACKENDS):
        raise ConfigurationError(
            f"TETHERTUNE_BACKEND={name!r} is not known: use {', '.join(BACKENDS)}, or leave it unset."
            f"{did_you_mean(str(name), BACKENDS)}"
        )
    return name


def choose(device: torch.device) -> str:
    """The backend for weights on a device.

    The first call for a CPU compiles the C kernels, which takes some seconds, once on a machine.

    Raises:
        ConfigurationError: ``TETHERTUNE_BACKEND`` forces one that cannot run there.
    """
    name = forced()
    if name == "chunked":
        return name
    best = {"cpu": "native", "cuda": "triton"}.get(device.type, "chunked")
    reason = _why_not(best) if name in (None, best) else f"it is not for weights on {device.type}"
    if name is None:
        return "chunked" if reason else best
    if reason:
        raise ConfigurationError(f"TETHERTUNE_BACKEND={name} cannot run: {reason}. Unset it, or use 'chunked'.")
    return name


@functools.cache
def _why_not(backend: str) -> str | None:
    """Why a backend cannot run on this machine; ``None`` if it can. Logged where it is found out."""
    reason = None
    if backend == "native":
        try:
            library.load()
        except library.CannotCompileError as error:
            reason = str(error)
    elif backend == "triton" and find_spec("triton") is None:
        reason = "Triton is not installed"
    if reason:
        _log.info("the %s kernels cannot run (%s); the slower PyTorch ones do the same", backend, reason)
    return reason
