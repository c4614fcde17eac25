"""Where tensors live: the machine's GPU, or its CPU."""

from __future__ import annotations

import torch

from fedcompo.errors import ConfigError


def pick_device(wanted: str) -> torch.device:
    """Return the device of that name; ``auto`` takes a GPU where there is one.

    Raises:
        ConfigError: If it is a GPU and there is none.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"`device` is {wanted!r}, but this machine shows no GPU. Use auto or cpu."
        )
    return torch.device(wanted)
