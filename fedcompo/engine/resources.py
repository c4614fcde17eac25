"""Shares the CPUs and GPUs of this machine among the clients of a simulation."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

from fedcompo.errors import ConfigError

CLIENTS_PER_GPU = 8
"""Clients that share a GPU by default, at most: each has a model and a CUDA context of its own."""

DRIVERS = ("nvidiactl", "kfd", "dxg")
"""Devices without which torch finds no GPU: NVIDIA's, AMD's, and those of Windows."""

WAITING = 8
"""Requests under way for each CPU, at most: whatever waits for a CPU has its time running."""


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs of a simulation's clients."""

    gpus_per_client: float
    cpus: int
    """CPUs given to Ray, which starts a process for each of them."""

    def federation(self, clients: int) -> dict[str, float]:
        """Return them as Flower's simulation settings."""
        return {
            "num-supernodes": clients,
            "client-resources-num-cpus": 1,
            "client-resources-num-gpus": self.gpus_per_client,
            "init-args-num-cpus": self.cpus,
        }

    def in_flight(self, clients: int) -> int:
        """Requests to have under way at a time; 0: all, where that is few enough."""
        most = WAITING * self.cpus
        return most if clients > most else 0


def fair_resources(
    clients: int,
    device: str,
    *,
    gpus_per_client: float | None = None,
) -> Resources:
    """Share this machine among the clients.

    A client gets one CPU: with more, its bits would be others. The clients that run at a time share
    the GPUs evenly.

    Args:
        clients: Number of clients.
        device: The run's ``device``.
        gpus_per_client: Share of a GPU, or whole GPUs, a client; None: a fair share.

    Raises:
        ConfigError: If a client would get more than there is, or a device it will not see.
    """
    if ":" in device:
        raise ConfigError(
            f"`device` is {device!r}, but in a simulation a client sees only the GPU it is dealt. "
            f'Use `device = "cuda"` and, in the environment, '
            f"CUDA_VISIBLE_DEVICES={device.partition(':')[2]}."
        )
    at_once = min(clients, _cpus())
    gpus = _gpus() if device in ("auto", "cuda") else 0
    if (gpus_per_client or 0) > gpus:
        raise ConfigError(
            f"A client cannot get {gpus_per_client} GPUs: "
            f"with `device` = {device!r} there are {gpus}."
        )
    if gpus_per_client is None:
        sharing = min(CLIENTS_PER_GPU, math.ceil(at_once / gpus)) if gpus else 0
        # Rounded down, so that they fit; Ray knows four decimals.
        gpus_per_client = math.floor(10_000 / sharing) / 10_000 if sharing else 0.0
    return Resources(gpus_per_client, at_once)


def _cpus() -> int:
    """CPUs that this process may use; in a container, its limit (cgroup v2)."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    cpus = len(allowed) or os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # "max 100000": no limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, max(1, int(quota) // int(period)))
    return cpus


def _gpus() -> int:
    if not any(Path("/dev", driver).exists() for driver in DRIVERS):
        return 0  # at once: torch takes seconds to load
    import torch

    return torch.cuda.device_count()
