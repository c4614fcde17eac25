r"""TIES: trim small changes, elect a sign for each entry, average those that have it.

With :math:`\hat\tau_c` the fraction `density` of entries of :math:`\tau_c` that are largest in
absolute value, the others zero, entry by entry,

.. math:: \gamma = \mathrm{sgn}\Big(\sum_c m_c \hat\tau_c\Big), \qquad
   \mathrm{total} = M\,\frac{\sum_{c \in A} m_c \hat\tau_c}{\sum_{c \in A} m_c}, \qquad
   A = \{c : \mathrm{sgn}\,\hat\tau_c = \gamma\}

It is trimmed by weight, as PEFT and mergekit do, not over the whole model. Entries as large as the
smallest that is kept are kept too; a sum of zero elects the positive sign.
Source: Yadav et al., NeurIPS 2023 (arXiv 2306.01708).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedcompo.composition.rules.rule import Changes, Rule
from fedcompo.config.setting import setting


@dataclass(frozen=True)
class Ties(Rule):
    """One pass: the sums of each sign are kept apart until one is elected.

    A member costs one selection; four weights more than the mean are in memory.
    """

    name: ClassVar[str] = "ties"
    density: float = setting(
        0.2, "Share of entries that is kept.", (lambda value: 0 < value <= 1, "must be in (0, 1]")
    )

    def total(self, changes: Changes) -> Tensor:
        """Return M times the disjoint mean."""
        shape = (2, *changes.weight.shape)
        sums, counts = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        for change in changes:
            kept = trimmed(change.tau, self.density)
            for sign, side in enumerate((kept.clamp_min(0), kept.clamp_max(0))):
                sums[sign].add_(side, alpha=change.times)
                counts[sign].add_(side != 0, alpha=change.times)
        means = sums / counts.clamp_min_(torch.finfo(torch.float64).tiny)
        elected = sums.sum(0) >= 0
        return means[0].where(elected, means[1]).mul_(changes.together)


def trimmed(tau: Tensor, density: float) -> Tensor:
    """Return a copy in which only the largest entries are left, at least one.

    Args:
        tau: Of any shape; not empty.
        density: Share of entries that is kept.
    """
    sizes, place = tau.abs(), tau.numel() - max(1, int(density * tau.numel()))
    threshold = float(np.partition(sizes.flatten().numpy(), place)[place])  # faster than kthvalue
    return tau.where(sizes >= threshold, 0)
