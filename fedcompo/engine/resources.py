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


@dataclass(frozen=True)
class Resources:
    """CPUs and GPUs of a simulation's clients."""

    cpus_per_client: int
    gpus_per_client: float
    cpus: int
    """CPUs given to Ray in all: it starts a process for each client that fits in."""

    @property
    def at_once(self) -> int:
        """Clients that work at a time."""
        return self.cpus // self.cpus_per_client

    def federation(self, clients: int) -> dict[str, float]:
        """Return them as Flower's simulation settings."""
        return {
            "num-supernodes": clients,
            "client-resources-num-cpus": self.cpus_per_client,
            "client-resources-num-gpus": self.gpus_per_client,
            "init-args-num-cpus": self.cpus,
        }


def fair_resources(
    clients: int,
    device: str,
    *,
    cpus_per_client: int | None = None,
    gpus_per_client: float | None = None,
    gpus: int | None = None,
) -> Resources:
    """Share this machine among the clients, as far as the caller has not decided.

    By default a client gets one CPU, and the clients that run at a time share the GPUs evenly.

    Args:
        clients: Number of clients.
        device: The run's ``device``.
        cpus_per_client: CPUs a client; None: 1.
        gpus_per_client: Share of a GPU, or whole GPUs, a client; None: a fair share.
        gpus: GPUs of this machine; None: ask torch.

    Raises:
        ConfigError: If a client would get more than there is, or a device it will not see.
    """
    if ":" in device:
        raise ConfigError(
            f"`device` is {device!r}, but in a simulation a client sees only the GPU it is dealt. "
            f'Use `device = "cuda"` and, in the environment, '
            f"CUDA_VISIBLE_DEVICES={device.partition(':')[2]}."
        )
    available, cpus = _cpus(), cpus_per_client or 1
    if cpus > available:
        raise ConfigError(f"A client cannot get {cpus} CPUs: this machine has {available}.")
    at_once = min(clients, available // cpus)
    if device not in ("auto", "cuda"):
        gpus = 0
    elif gpus is None:
        gpus = _gpus()
    if (gpus_per_client or 0) > gpus:
        raise ConfigError(
            f"A client cannot get {gpus_per_client} GPUs: "
            f"with `device` = {device!r} there are {gpus}."
        )
    if gpus_per_client is None:
        sharing = min(CLIENTS_PER_GPU, math.ceil(at_once / gpus)) if gpus else 0
        # Rounded down, so that they fit; Ray knows four decimals.
        gpus_per_client = math.floor(10_000 / sharing) / 10_000 if sharing else 0.0
    return Resources(cpus, gpus_per_client, at_once * cpus)


def _cpus() -> int:
    """CPUs that this process may use; in a container, its limit (cgroup v2)."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    cpus = len(allowed) or os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # "max 100000": no limit
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, max(1, int(quota) // int(period)))
    return cpus


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
