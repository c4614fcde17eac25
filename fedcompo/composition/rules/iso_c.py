r"""Iso-C: the sum with all its singular values made equal.

.. math:: \sum_c m_c\,\tau_c = U\,\mathrm{diag}(\sigma)\,V^\top, \qquad
   \mathrm{total} = \bar\sigma\,U V^\top

with :math:`\bar\sigma` the mean over the numerical rank, so that a sum of LoRAs stays in the
directions that its members trained (:mod:`fedcompo.composition.rules.singular`). A weight of more
than two dimensions is taken as (out, rest); of a vector, which has no directions, the sum stays.
Source: Marczak et al., ICML 2025 (arXiv 2502.04959).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedcompo.composition.head import one_thread
from fedcompo.composition.rules.rule import Changes, Removal, Rule
from fedcompo.composition.rules.singular import numerical_svd


@dataclass(frozen=True)
class IsoC(Rule):
    """An isotropic sum."""

    name: ClassVar[str] = "iso-c"
    removal: ClassVar[Removal] = Removal.SUM
    portable: ClassVar[bool] = False
    cost: ClassVar[str] = "one decomposition a weight"

    def total(self, changes: Changes) -> Tensor:
        """Return the isotropic sum."""
        total = changes.sum()
        if total.dim() < 2:
            return total
        with one_thread():
            u, values, vh = numerical_svd(total.flatten(1), changes.together)
            if not len(values):
                return total.zero_()
            return (u @ vh).mul_(values.mean()).view(total.shape)
