r"""Choose λ and the joint head's shrinkage by the clients' votes on images kept aside.

The composed model is :math:`\theta_0 + \lambda\bar\tau` with :math:`\bar\tau` the weighted mean of
T task vectors; λ = T is their plain sum. The best λ lies between 1 and 2T and moves with the data,
so a handful is tried, each under heads of several shrinkages. On its images kept aside from
training, each client measures the quadratic score (Brier, 1950) of each candidate,

.. math:: L(t) = \sum_x \lVert \mathrm{softmax}(t\,z(x)) - e_{y(x)} \rVert^2

with logits z and temperatures t: a head in closed form is not calibrated, and whether it is sharp
or soft must not decide. A candidate's score is its loss at the temperature that suits it best over
the images of all clients. The score moves less by chance than the number of hits, and no single
image can decide, as in a cross-entropy: it adds at most two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SHRINKAGES = (0.02, 0.1, 0.3, 0.7)
"""Shrinkages of the joint head's covariance that are tried."""
TEMPERATURES = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03)
"""Factors on the logits; each candidate is measured at all of them."""
WORST = 2.0
"""Largest loss that an image can add."""


@dataclass(frozen=True)
class Votes:
    """Sums over the images kept aside, of one client or of all; of each candidate."""

    hits: tuple[int, ...]
    """Images classified correctly, by candidate."""
    losses: tuple[float, ...]
    """Quadratic scores by candidate and temperature, candidate by candidate."""
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
            for temperature in TEMPERATURES:
                apart = ((own.double() * temperature).softmax(1) - truth).square().sum(1)
                losses.append(float(apart.nan_to_num(WORST).sum()))
        return cls(tuple(hits), tuple(losses), len(labels))

    @classmethod
    def none(cls, count: int) -> Votes:
        """Return the votes on so many candidates of a client that keeps no image aside."""
        return cls((0,) * count, (0.0,) * count * len(TEMPERATURES), 0)

    def __add__(self, other: Votes) -> Votes:
        """Sum over the images of both."""
        return Votes(
            tuple(a + b for a, b in zip(self.hits, other.hits, strict=True)),
            tuple(a + b for a, b in zip(self.losses, other.losses, strict=True)),
            self.num_examples + other.num_examples,
        )

    @property
    def scores(self) -> list[float]:
        """Mean loss of each candidate at the temperature that suits it best."""
        by_candidate = torch.tensor(self.losses, dtype=torch.float64).reshape(len(self.hits), -1)
        return [float(least) / self.num_examples for least in by_candidate.amin(1)]


@dataclass(frozen=True)
class Candidate:
    """One composed model under one head."""

    scale: float
    """λ, a multiple of the weighted mean of the task vectors."""
    shrinkage: float


def scales(members: int) -> tuple[float, ...]:
    """Return the λ that are tried for so many members, ascending.

    They are 0 (the frozen backbone), 1, √T, T/2, T and 2T, but for T/2 below 1, and the larger of
    two that are within a fifth of each other.
    """
    total = float(members)
    wanted = sorted({1.0, math.sqrt(total), max(1.0, total / 2), total, 2 * total})
    tried = [0.0]
    for scale in wanted:
        if scale > 1.2 * tried[-1]:
            tried.append(scale)
    return tuple(tried)


def candidates(members: int) -> list[Candidate]:
    """Return all candidates: every λ with the first shrinkage, then with the second, and so on."""
    return [Candidate(scale, own) for own in SHRINKAGES for scale in scales(members)]


def elected(tried: Sequence[Candidate], votes: Votes) -> int:
    """Return the index of the candidate with the least score.

    Of equals the smallest λ wins, and then the largest shrinkage.
    """

    def order(index: int) -> tuple[float, float, float]:
        return scores[index], tried[index].scale, -tried[index].shrinkage

    scores = votes.scores
    return min(range(len(tried)), key=order)
