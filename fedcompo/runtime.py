"""This process: its device, its peak memory, its packages.

Torch is imported where it is used, so that a program that asks for a version does not wait for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedcompo.errors import ConfigError, ContributionError

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Made = TypeVar("Made")
SOON = 0.05
"""Seconds after which threads are started: they take a millisecond each."""
THREADS = 4
"""Threads that stream weights at most: each holds a few."""
PACKAGES = ("fedcompo", "torch", "timm")
"""Packages on which a client's results depend."""
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Linux: figures of this process, and where writing 5 resets the largest (man proc)."""
_KEPT = ((-3, 2**25), (-3, 2**28), (-1, 2**30))
"""Options of glibc (man mallopt): blocks mapped by themselves, as large as it takes; free memory at
the end of the heap that is handed back."""
_MEMORY, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
"""Linux: memory of the machine, and of the container (cgroup v2)."""


def pick_device(wanted: str) -> torch.device:
    """Return the device of that name; ``auto`` takes a GPU where there is one.

    Raises:
        ConfigError: If a GPU is wanted and there is none.
    """
    import torch

    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError.public(
            f"`device` is {wanted!r}, but this machine shows no GPU. Use auto or cpu."
        )
    return torch.device(wanted)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread; the bits of a matrix product depend on their number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_order(
    work: Callable[[Item], Made], items: Iterable[Item], *, most: int = THREADS, ahead: int = 1
) -> Iterator[Made]:
    """Do the work of each item in a few threads, in each of which torch uses one.

    Results come in the order of items, and so does an error: the first item's, after which no more
    is begun. They are the same bits for any number of threads. What is soon done takes none.

    Args:
        work: Must not change what another thread reads.
        items: Asked for one at a time, by the caller's thread.
        most: Threads at most.
        ahead: Results a thread that wait for their turn at most; they are in memory.
    """
    import torch

    def begin() -> None:
        """Other threads may set another number meanwhile; the first call asks for it."""
        torch.get_num_threads()
        torch.set_num_threads(1)

    count, upcoming, began = min(most, workers()), iter(items), time.perf_counter()
    with one_thread():
        for item in upcoming:
            yield work(item)
            if count > 1 and time.perf_counter() - began > SOON:
                break
        with ThreadPoolExecutor(count, "fedcompo", begin) as pool:
            begun: deque[Future[Made]] = deque()
            try:
                for item in upcoming:
                    begun.append(pool.submit(work, item))
                    if len(begun) > count * ahead:
                        yield begun.popleft().result()
                while begun:
                    yield begun.popleft().result()
            finally:
                for future in begun:
                    future.cancel()


def workers() -> int:
    """How many threads work: a CPU each, or as many as ``OMP_NUM_THREADS`` allows.

    Measured on two cores with JPEGs of 256 pixels: two decode 1.7 times as fast as one; two
    processes, which send pixels, 1.1 times.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    allowed = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # Ray sets it for its actors
    return max(1, min(usable or 1, int(allowed) if allowed.isdecimal() else usable or 1))


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Let the allocator keep what one batch frees for the next, where it is glibc's.

    By itself it hands large blocks back to Linux, and each batch pays for new pages: as much as
    a forward pass of a small model. What is free at the end is handed back.
    """
    try:
        libc = ctypes.CDLL(None)
        for option, size in _KEPT:
            libc.mallopt(option, size)
    except (AttributeError, OSError, TypeError):  # not Linux, or another allocator
        yield
        return
    try:
        yield
    finally:
        libc.malloc_trim(0)


def reset_peak() -> None:
    """Start to measure the peak memory anew, where the system can."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        _RESET.write_text("5")


def peak_bytes() -> dict[str, int]:
    """Return the largest memory since the last reset.

    Returns:
        ``resident``: of this process, on Linux; ``gpu``: allocated by torch, where there is a GPU.
    """
    import torch

    peaks = {}
    with contextlib.suppress(OSError, StopIteration):
        lines = _STATUS.read_text().splitlines()
        high_water = next(line for line in lines if line.startswith("VmHWM:"))
        peaks["resident"] = int(high_water.split()[1]) * 1024
    if torch.cuda.is_available():
        peaks["gpu"] = torch.cuda.max_memory_allocated()
    return peaks


def available_bytes() -> int:
    """Return the memory that is free, on Linux; in a container, within its limit; 0: not known."""
    free = 0
    with contextlib.suppress(OSError, KeyError, ValueError):
        lines = dict(line.split(":") for line in _MEMORY.read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
        limit, used = (int((_GROUP / f"memory.{part}").read_text()) for part in ("max", "current"))
        free = min(free, limit - used)
    return free


@functools.cache
def version(package: str) -> str:
    """Return the installed version of a package; cached, because looking it up reads a file."""
    return importlib.metadata.version(package)


def installed_versions() -> dict[str, str]:
    """Return the versions of :data:`PACKAGES` that are installed here, by package."""
    return {package: version(package) for package in PACKAGES}


def check_versions(client: str, stated: Mapping[str, Any]) -> str:
    """Compare a client's versions with the server's.

    Args:
        client: Its name.
        stated: Versions by package.

    Returns:
        A note on the packages that differ; empty if none does.

    Raises:
        ContributionError: If its fedcompo is of another release, whose numbers may mean something
            else.
    """
    own = installed_versions()
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
    """Return ``1.2`` of ``1.2.3``."""
    return tuple(text.split(".")[:2])
