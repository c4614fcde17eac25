r"""RegMean with diagonal Gram matrices: columns are averaged by the squares of a layer's inputs.

A member's layer turns inputs :math:`X_c` (rows: tokens) into :math:`X_c W_c^\top`. One layer for
all is the nearest in :math:`\sum_c m_c \lVert X_c (W - W_c)^\top\rVert^2`. With the Gram matrices
:math:`X_c^\top X_c` reduced to their diagonals, it is the mean of
:mod:`fedcompo.composition.rules.weighted`, column by column, by the squares of the layer's inputs
under :math:`\theta_0`, (in,) for each weight, which members send with their Fisher; in the source
their sum, under each member's own weights. Sources: Jin et al., *Dataless Knowledge Fusion by
Merging Weights of Language Models*, ICLR 2023 (arXiv 2212.09849), where what is beside the diagonal
is reduced by a factor, here 0; Salami et al., *Closed-form Merging of Parameter-Efficient Modules*,
ICLR 2025 (arXiv 2410.17961), for diagonals in a federation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedcompo.composition.rules.weighted import Weighted
from fedcompo.method.fisher import FisherDiagonal


@dataclass(frozen=True)
class RegMean(Weighted):
    """Weighs by the mean squares of a layer's inputs; two weights more in memory than the mean."""

    name: ClassVar[str] = "regmean"
    needs: ClassVar[str] = "squares of layers' inputs"
    takes_inputs: ClassVar[bool] = True

    def own_weights(self, fisher: FisherDiagonal, name: str) -> Tensor:
        """Return the mean squares of the layer's inputs, (in,)."""
        return fisher.inputs_of(name)
