"""Seeds of everything random, derived from one number and what it is for."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *purpose: str) -> int:
    """Return a seed in [0, 2^31) that depends on the run's seed and the purpose alone.

    Args:
        seed: The run's seed.
        purpose: Words such as the phase and the client's name.
    """
    digest = hashlib.sha256("\x1f".join((str(seed), *purpose)).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def generator_for(seed: int, *purpose: str) -> torch.Generator:
    """Return a generator on the CPU, seeded by :func:`derive_seed`."""
    import torch  # not for a look at names alone

    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
