"""This process: its device, its peak memory, its packages.

Torch is imported where it is used: whoever asks for a version alone does not wait for it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcompo.errors import ConfigError, ContributionError

if TYPE_CHECKING:
    import torch


def pick_device(wanted: str) -> torch.device:
    """Return the device of that name; ``auto`` takes a GPU where there is one.

    Raises:
        ConfigError: If it is a GPU and there is none.
    """
    import torch

    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"`device` is {wanted!r}, but this machine shows no GPU. Use auto or cpu."
        )
    return torch.device(wanted)


_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Start a new measurement; where the system cannot, the old one goes on."""
    import torch

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
    import torch

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


PACKAGES = ("fedcompo", "torch", "timm")
"""What a client's figures depend on."""


@functools.cache
def version(package: str) -> str:
    """Installed version of a package; looked up once, because that reads a file."""
    return importlib.metadata.version(package)


def of_this_process() -> dict[str, str]:
    """Installed versions by package."""
    return {package: version(package) for package in PACKAGES}


def check_versions(client: str, stated: Mapping[str, Any]) -> str:
    """Compare a client's versions with the server's.

    Args:
        client: Its name.
        stated: Versions by package.

    Returns:
        What should be known of them; empty: they are the same.

    Raises:
        ContributionError: If its fedcompo is of another release, which may mean something else by
            the same numbers.
    """
    own = of_this_process()
    theirs = {package: str(stated.get(package, "unknown")) for package in PACKAGES}
    if _release(theirs["fedcompo"]) != _release(own["fedcompo"]):
        raise ContributionError(
            f"Client {client!r} runs fedcompo {theirs['fedcompo']}, this server {own['fedcompo']}. "
            "Install the same release on both."
        )
    differing = [
        f"{package} {theirs[package]} (here {own[package]})"
        for package in PACKAGES
        if theirs[package].partition("+")[0] != own[package].partition("+")[0]
    ]
    return f"{client} runs {', '.join(differing)}." if differing else ""


def _release(text: str) -> tuple[str, ...]:
    """``1.2`` of ``1.2.3``."""
    return tuple(text.split(".")[:2])
