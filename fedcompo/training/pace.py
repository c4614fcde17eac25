"""How fast a client trains: images a step, number of steps, and their size."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from fedcompo.config.choices import Kind
from fedcompo.config.run import TrainConfig
from fedcompo.method.deltas import Delta, Weights

LEARNING_RATES = {Kind.LORA: 2e-3, Kind.FULL: 3e-4, Kind.IA3: 1e-2, Kind.TANGENT: 3e-4}
"""Peak step size of each kind where ``learning-rate`` is 0: the fewer parameters, the larger."""

USUAL_SIZE = 0.05
"""Root mean square of a weight that these step sizes are meant for; those of vision transformers
are near it. A weight of another size gets steps in proportion, to the nearest power of two. So a
backbone that computes the same with layers of other scales trains alike."""

SMALLEST_BATCH = 8
"""Images a step at least, where batches are made smaller to take more steps."""


def pace(count: int, config: TrainConfig, share: float) -> tuple[int, int]:
    """Return the images a step, and the number of steps.

    Args:
        count: Number of images.
        config: Passes, floor of steps, images a step at most.
        share: Share of the whole training that this is.
    """
    batch, floor = config.batch_size, math.ceil(round(config.local_steps * share, 6))
    if floor:
        batch = min(batch, max(SMALLEST_BATCH, config.local_epochs * count // floor))
    return batch, max(config.local_epochs * math.ceil(count / batch), floor)


def by_step_size(deltas: Mapping[str, Delta], theta_0: Weights) -> dict[float, list[nn.Parameter]]:
    """Return the trained parameters by the factor on their step size.

    Args:
        deltas: Trainable changes by weight name.
        theta_0: Pre-trained weights, whose size is the unit of the steps; of one that is missing,
            or zero, the factor is 1.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for weight, delta in deltas.items():
        size = float(theta_0[weight].square().mean().sqrt()) if weight in theta_0 else 0.0
        factor = 2.0 ** round(math.log2(size / USUAL_SIZE)) if size else 1.0
        for name, parameter in delta.named_parameters():
            groups.setdefault(factor if name in delta.sized else 1.0, []).append(parameter)
    return groups
