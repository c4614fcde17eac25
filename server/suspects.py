"""Task vectors that cannot be what they are said to be: far too long, or somebody else's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from fedcompo.errors import ContributionError
from fedcompo.method.deltas import Weights
from fedcompo.method.task_vector import TaskVector
from fedcompo.storage.tensorfile import tensor_digest

FEWEST = 3
"""Task vectors below which nobody can be told to stand out."""


def too_long(norms: Mapping[str, float], ratio: float) -> dict[str, str]:
    r"""Whose :math:`\lVert\tau_c\rVert` exceeds ratio times the median of all norms.

    Args:
        norms: Norm of each client's task vector.
        ratio: 0: nobody's is too long.

    Returns:
        By client, why it is refused.
    """
    if not ratio or len(norms) < FEWEST:
        return {}
    usual = median(norms.values())
    return {
        client: (
            f"Its task vector has norm {norm:.3g}, more than `max-norm-ratio` = {ratio:g} times "
            f"the median {usual:.3g}. Look at its data and its learning rate."
        )
        for client, norm in norms.items()
        if norm > ratio * usual
    }


def norm_of(vector: TaskVector, theta_0: Weights) -> float:
    """Euclidean norm of a task vector, over all target weights."""
    parts = (float(vector.delta(name, weight).norm()) for name, weight in theta_0.items())
    return math.hypot(*parts)


@dataclass
class Originals:
    """Who was the first to send a task vector."""

    owners: dict[str, str] = field(default_factory=dict)
    """Client, by SHA-256 of its task vector."""

    def check(self, client: str, vector: TaskVector) -> None:
        """Refuse what another client sent before; raises ``ContributionError``.

        Two trainings never end at the same bits, unless they learnt nothing at all.
        """
        if not any(bool(tensor.any()) for tensor in vector.tensors.values()):
            return
        owner = self.owners.setdefault(tensor_digest(vector.tensors), client)
        if owner != client:
            raise ContributionError(
                f"Client {client!r} sent, byte for byte, the task vector of {owner!r}: a copy of a "
                "contribution that is not its own."
            )
