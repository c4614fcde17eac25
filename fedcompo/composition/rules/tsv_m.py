r"""TSV-M: the leading singular vectors of each member, made orthogonal to each other's.

Of each :math:`\tau_c = U_c\,\mathrm{diag}(\sigma_c)\,V_c^\top` the leading
:math:`k = \lfloor \min(\mathrm{out}, \mathrm{in}) / T \rfloor` stay, at least one, at most its
numerical rank. Side by side, :math:`U = (U_1, …, U_T)` and :math:`V` are replaced by the nearest
matrices with orthonormal columns:

.. math:: \mathrm{total} = U (U^\top U)^{+1/2}\;\mathrm{diag}(\sigma_1, …, \sigma_T)\;
   (V^\top V)^{+1/2}\,V^\top

Members that are equal count as one. Its equation has no weights: members count alike. T·k vectors
are in memory. Source: Gargiulo et al., CVPR 2025 (arXiv 2412.00081).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedcompo.composition.rules.rule import Changes, Rule
from fedcompo.composition.rules.singular import nearest_isometry, numerical_svd
from fedcompo.runtime import one_thread


@dataclass(frozen=True)
class TsvM(Rule):
    """Task singular vectors, merged; a decomposition a member and two more."""

    name: ClassVar[str] = "tsv-m"
    weighted: ClassVar[bool] = False
    portable: ClassVar[bool] = False

    def total(self, changes: Changes) -> Tensor:
        """Return the sum of the leading parts, made orthogonal."""
        most = max(1, min(changes.weight.shape) // len(changes))
        left, sizes, right = [], [], []
        with one_thread():
            for change in changes:
                u, values, vh = numerical_svd(change.tau, changes.weight)
                left.append(u[:, :most])
                sizes.append(values[:most])
                right.append(vh[:most].T)
            u, v = (nearest_isometry(torch.cat(side, 1)) for side in (left, right))
            return (u * torch.cat(sizes)) @ v.T * next(iter(changes.times.values()))
