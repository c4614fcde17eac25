r"""Iso-C: the sum with all its singular values made equal.

.. math:: \sum_c m_c\,\tau_c = U\,\mathrm{diag}(\sigma)\,V^\top, \qquad
   \mathrm{total} = \bar\sigma\,U V^\top

with :math:`\bar\sigma` the mean over the numerical rank, so that a sum of LoRAs stays in the
directions that its members trained. Source: Marczak et al., ICML 2025 (arXiv 2502.04959).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fedcompo.composition.rules.rule import Changes, Rule
from fedcompo.composition.rules.singular import numerical_svd
from fedcompo.runtime import one_thread


@dataclass(frozen=True)
class IsoC(Rule):
    """An isotropic sum; one decomposition a weight."""

    name: ClassVar[str] = "iso-c"
    removal: ClassVar[Literal["O(1)", "O(T)"]] = "O(1)"
    portable: ClassVar[bool] = False

    def total(self, changes: Changes) -> Tensor:
        """Return the isotropic sum."""
        with one_thread():
            u, values, vh = numerical_svd(changes.sum(), changes.weight, changes.together)
            mean = values.mean() if len(values) else 0.0
            return (u @ vh).mul_(mean)
