r"""Means in which each member weighs by something of its own, in each entry.

.. math:: \mathrm{total} = M\,\frac{\sum_c m_c\,\omega_c \circ \tau_c}{\sum_c m_c\,\omega_c}

with :math:`\omega_c \ge 0` a *mean* over the member's examples, so that :math:`m_c` alone says how
much a member counts. Where :math:`\sum_c m_c \omega_c` is zero, nobody weighs anything there: the
entry is the mean's, :math:`\sum_c m_c \tau_c`.

A member states :math:`\omega_c` itself: whoever claims large ones decides those entries alone.

*fisher*: the weights are the Fisher diagonal that the member sends for its anchor
(:meth:`~fedcompo.method.fisher.FisherDiagonal.diagonal_of`). In the default form, ``factored``, it
is of rank one: row sums times column sums over the root of both totals. Then whose entry counts is
known by row and by column, not for each entry by itself. It is taken at :math:`\theta_0`, of the
features or of the class probabilities (``curvature``); in the source at each member's own weights,
of the class probabilities. Source: Matena & Raffel, *Merging Models with Fisher-Weighted
Averaging*, NeurIPS 2022 (arXiv 2111.09832).

*regmean*: columns are averaged by the squares of a layer's inputs.
A member's layer turns inputs :math:`X_c` (rows: tokens) into :math:`X_c W_c^\top`. One layer for
all is the nearest in :math:`\sum_c m_c \lVert X_c (W - W_c)^\top\rVert^2`. With the Gram matrices
:math:`X_c^\top X_c` reduced to their diagonals, it is this mean, column by column, by the squares
of the layer's inputs under :math:`\theta_0`, (in,), which members send with their Fisher; in the
source their sum, under each member's own weights. Sources: Jin et al., *Dataless Knowledge Fusion
by Merging Weights of Language Models*, ICLR 2023 (arXiv 2212.09849), where what is beside the
diagonal is reduced by a factor, here 0; Salami et al., *Closed-form Merging of Parameter-Efficient
Modules*, ICLR 2025 (arXiv 2410.17961), for diagonals in a federation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedcompo.composition.rules.rule import Changes, Rule
from fedcompo.config.choices import Curvature
from fedcompo.config.run import RunConfig
from fedcompo.errors import ContributionError
from fedcompo.method.contribution import Contribution
from fedcompo.method.fisher import FisherDiagonal


@dataclass(frozen=True)
class Weighted(Rule):
    """One pass over the members; no sum or product depends on the machine."""

    @abstractmethod
    def own_weights(self, fisher: FisherDiagonal, name: str) -> Tensor:
        """Return a member's weights, float64, (out, in) or (in,); a new tensor."""

    def total(self, changes: Changes) -> Tensor:
        """Return M times the weighted mean."""
        total = torch.zeros(changes.weight.shape, dtype=torch.float64)
        mass = torch.zeros((), dtype=torch.float64)
        for change in changes:
            assert change.member.fisher is not None  # see :meth:`check`
            own = self.own_weights(change.member.fisher, changes.name).mul_(change.times)
            mass = mass + own
            total.add_(change.tau.mul_(own))
        total.mul_(changes.together).div_(mass)
        return total if (mass > 0).all() else total.where(mass > 0, changes.sum())


@dataclass(frozen=True)
class Fisher(Weighted):
    """Weighs by the Fisher diagonal; three weights more in memory than the mean."""

    name: ClassVar[str] = "fisher"
    needs: ClassVar[str] = "Fisher"

    def own_weights(self, fisher: FisherDiagonal, name: str) -> Tensor:
        """Return the mean Fisher of one weight, (out, in)."""
        return fisher.diagonal_of(name)

    def check(self, members: Sequence[Contribution], times: Mapping[str, float]) -> None:
        """Refuse also Fishers of the features beside those of class probabilities."""
        super().check(members, times)
        units: dict[bool, str] = {}
        for own in members:
            curvature = RunConfig.stored(own.settings).fisher.curvature
            units.setdefault(curvature is Curvature.FEATURES, own.client)
        if len(units) > 1:
            raise ContributionError(
                f"The Fisher of client {units[True]!r} is of the features, that of "
                f"{units[False]!r} of class probabilities, in another unit. Train all with the "
                "same `curvature`, or compose by another rule."
            )


@dataclass(frozen=True)
class RegMean(Weighted):
    """Weighs by the mean squares of a layer's inputs; two weights more in memory than the mean."""

    name: ClassVar[str] = "regmean"
    needs: ClassVar[str] = "squares of layers' inputs"
    takes_inputs: ClassVar[bool] = True

    def own_weights(self, fisher: FisherDiagonal, name: str) -> Tensor:
        """Return the mean squares of the layer's inputs, (in,)."""
        return fisher.inputs_of(name)
