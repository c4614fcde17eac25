"""Peak memory of a piece of work, where the system tells."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Start a new measurement; where the system cannot, the old one goes on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        _RESET.write_text("5")  # Linux: forget the largest resident size so far (man proc)


def peak_bytes() -> dict[str, int]:
    """Largest memory since the last reset.

    Returns:
        ``resident``: of this process, where it is known (since the process began, where Linux's
        reset is not to be had); ``gpu``: allocated by torch, where there is a GPU.
    """
    peaks = {}
    with contextlib.suppress(OSError, StopIteration):
        lines = _STATUS.read_text().splitlines()
        high_water = next(line for line in lines if line.startswith("VmHWM:"))
        peaks["resident"] = int(high_water.split()[1]) * 1024
    if not peaks:
        with contextlib.suppress(ImportError):
            import resource

            largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peaks["resident"] = largest * (1 if sys.platform == "darwin" else 1024)
    if torch.cuda.is_available():
        peaks["gpu"] = torch.cuda.max_memory_allocated()
    return peaks
