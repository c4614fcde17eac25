r"""DARE: drop entries at random, enlarge the others to make up for it, then add.

.. math:: \mathrm{total} = \sum_c m_c\,\frac{b_c \odot \tau_c}{1 - p}, \qquad
   b_c \sim \mathrm{Bernoulli}(1 - p)

The draws follow from `seed`, the client's name and the weight's alone: whoever else is there, a
client keeps the same entries, so that to remove one is to leave out its term.
Source: Yu et al., ICML 2024 (arXiv 2311.03099).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedcompo.composition.rules.rule import Changes, Rule
from fedcompo.config.setting import FRACTION, NOT_NEGATIVE, setting
from fedcompo.seeds import derive_seed


@dataclass(frozen=True)
class Dare(Rule):
    """A sum of thinned task vectors; one draw an entry, and two weights more than the mean."""

    name: ClassVar[str] = "dare"
    drop: float = setting(0.9, "Probability that an entry is dropped.", FRACTION)
    seed: int = setting(0, "Seed of the draws.", NOT_NEGATIVE)

    def total(self, changes: Changes) -> Tensor:
        """Return the sum of what is kept."""
        total = torch.zeros(changes.weight.shape, dtype=torch.float64)
        for change in changes:
            kept = self.kept(change.member.client, changes.name, change.tau.shape)
            total.add_(change.tau.mul_(kept), alpha=change.times)  # no product is rounded here
        return total.div_(1 - self.drop)

    def kept(self, client: str, weight: str, shape: torch.Size) -> Tensor:
        """Draw which entries of a client's change of a weight stay, as booleans."""
        draws = np.random.PCG64(derive_seed(self.seed, "dare", client, weight))
        bits = draws.random_raw(shape.numel())  # of which numpy promises that they never change
        return torch.from_numpy(bits >= np.uint64(self.drop * 2.0**64)).view(shape)
