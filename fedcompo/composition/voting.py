r"""Choose λ by the clients' votes on images kept aside.

The composed model is :math:`\theta_0 + \lambda\bar\tau` with :math:`\bar\tau` the weighted mean of
T task vectors; λ = T is their plain sum. The best λ lies between 0 and 2T and moves with the data,
so a handful is tried. On its images kept aside from training, each client measures the quadratic
score (Brier, 1950) of each candidate, under the joint head of that model's features:

.. math:: L = \sum_x \lVert \mathrm{softmax}(t\,z(x)) - e_{y(x)} \rVert^2

with logits z and one small temperature t for all. The images kept aside are few. At t = 1 a head in
closed form is sure of nearly every image, and a handful near the border decides; softened, every
image counts by its margin, and the score moves less by chance. No single image can decide, as in a
cross-entropy: it adds at most two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.03
"""t, a factor on the logits."""
WORST = 2.0
"""Largest loss that an image can add."""


@dataclass(frozen=True)
class Votes:
    """Sums over the images kept aside, of one client or of all; of each candidate."""

    hits: tuple[float, ...]
    """Images classified correctly, by candidate."""
    losses: tuple[float, ...]
    """Quadratic scores, by candidate."""
    num_examples: int
    """Images; 0: nobody votes."""

    @classmethod
    def of(cls, logits: Iterable[Tensor], labels: Tensor) -> Votes:
        """Measure candidates.

        Args:
            logits: Of each candidate, (count, classes).
            labels: (count,), index into the classes.
        """
        hits: list[int] = []
        losses: list[float] = []
        for own in logits:
            hits.append(int((own.argmax(1) == labels).sum()))
            truth = F.one_hot(labels, own.shape[1])
            apart = ((own.double() * TEMPERATURE).softmax(1) - truth).square().sum(1)
            losses.append(float(apart.nan_to_num(WORST).sum()))
        return cls(tuple(hits), tuple(losses), len(labels))

    @classmethod
    def none(cls, count: int) -> Votes:
        """Return the votes on so many candidates of a client that keeps no image aside."""
        return cls((0,) * count, (0.0,) * count, 0)

    def capped(self, most: int) -> Votes:
        """Let it count as the votes on so many images at most."""
        share = min(1.0, most / max(1, self.num_examples))
        hits, losses = (tuple(share * own for own in sums) for sums in (self.hits, self.losses))
        return Votes(hits, losses, min(most, self.num_examples))

    def __add__(self, other: Votes) -> Votes:
        """Sum over the images of both."""
        return Votes(
            tuple(a + b for a, b in zip(self.hits, other.hits, strict=True)),
            tuple(a + b for a, b in zip(self.losses, other.losses, strict=True)),
            self.num_examples + other.num_examples,
        )


def scales(members: int) -> tuple[float, ...]:
    """Return the λ that are tried for so many members, ascending.

    They are 0 (the frozen backbone), 1, √T, T/2, T and 2T, but for T/2 below 1, and the smaller of
    two that are within a fifth of each other.
    """
    total = float(members)
    wanted = {1.0, math.sqrt(total), max(1.0, total / 2), total, 2 * total}
    tried: list[float] = []
    for scale in sorted(wanted, reverse=True):
        if not tried or 1.2 * scale < tried[-1]:
            tried.append(scale)
    return (0.0, *reversed(tried))


def elected(losses: Sequence[float]) -> int:
    """Return the index of the candidate with the least loss; of equals, the smallest λ."""
    return losses.index(min(losses))
