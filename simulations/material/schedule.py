"""Optimiser and learning rate of both pre-trainings."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch


def learning_rate(step: int, steps: int, peak: float, *, warmup: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def adamw(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices, but not on biases and scales."""
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        groups[parameter.ndim > 1].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": 0.05},
            {"params": groups[False], "weight_decay": 0.0},
        ]
    )
