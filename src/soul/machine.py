"""What a run was made on, and how much memory it took."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import platform
import resource
import shlex
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from soul import processes

_ASIDE = ("command", "cores", "platform")
"""What a machine is called by its system: a new kernel moves no number, a new processor has a line of its own."""


def environment() -> dict[str, Any]:
    """Return versions and machine, enough to know what a number was made with."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "accelerate", "peft", "numpy")}
    return {
        "soul": metadata.version("soul-unlearning"),
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes.count(),
        "step": f"{os.environ.get('SOUL_STEP') or 'auto'}, {_numba()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _numba() -> str:
    """Return what compiles fused steps, which round otherwise than plain ones."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return f"numba {metadata.version('numba')}"
    return "no numba"


def _processor() -> str:
    """Return the processor's name and the instructions that torch uses of it: both decide how sums are rounded."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux only
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def changes(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say in what two environments differ that may move a number; an empty text where in nothing.

    Example:
        >>> changes({"torch": "2.7", "threads": 2, "command": "a"}, {"torch": "2.8", "threads": 2, "command": "b"})
        'torch was 2.7 and is 2.8'
    """
    apart = [key for key in now if key in earlier and key not in _ASIDE and earlier[key] != now[key]]
    return ", ".join(f"{key} was {earlier[key]} and is {now[key]}" for key in apart)


def has_bf16(device: str = "cpu") -> bool:
    """Say whether the device multiplies bf16 matrices in hardware."""
    if device.startswith("cuda"):
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(supported())


def memory_of(device: torch.device) -> float:
    """Return the bytes of memory that a GPU has free, or this machine has at all; infinite where unknown."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not POSIX
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return math.inf


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()  # models and trainers of an earlier run are in cycles
    with contextlib.suppress(OSError, AttributeError):  # glibc only: it keeps what was freed, gigabytes of it
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak_memory() -> None:
    """Start :func:`peak_memory` anew, so that a second run in the same process reports its own."""
    free_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux only: 5 resets the high-water mark (man 5 proc)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the peak memory in bytes since the last reset: the GPU's if there is one, else this process's."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cache_dir() -> Path:
    """Return the folder for caches: ``SOUL_CACHE``, or the user's cache folder."""
    base = os.environ.get("SOUL_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "soul"
