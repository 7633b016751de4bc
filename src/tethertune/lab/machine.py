"""What a run was made on and with, for ``run.json``."""

import ctypes
import os
import platform
import resource
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe", "keep_memory", "peak_memory", "versions"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_MOST_KEPT = 32 << 20
"""Bytes of the largest block that glibc can be told not to map by itself (HEAP_MAX_SIZE / 2)."""

_PACKAGES = ("tethertune", "torch", "timm", "torchvision", "accelerate", "safetensors", "numpy")


def describe(device: torch.device) -> dict[str, Any]:
    """The machine: system, processor, cores, CPU threads in use, device and main memory in bytes."""
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # tethertune itself, run from a checkout that is not installed
            found[package] = "unknown"
    return found


def keep_memory() -> None:
    """Let the C library keep freed memory, for the next batch asks for as much again.

    glibc gives it back to the system otherwise, and every batch waits for each page of its activations anew: 15 % of
    the time of training small networks on a CPU, half of that of a certificate. From then on the process holds its
    peak. Other C libraries are left as they are.
    """
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _MOST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory(device: torch.device) -> int:
    """The largest memory that this process has held, in bytes: of the device on CUDA, else of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
