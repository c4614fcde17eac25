r"""Means in which each member weighs by something of its own, in each entry.

.. math:: \mathrm{total} = M\,\frac{\sum_c m_c\,\omega_c \circ \tau_c}{\sum_c m_c\,\omega_c}

with :math:`\omega_c \ge 0` a *mean* over the member's examples, so that :math:`m_c` alone says how
much a member counts. Where :math:`\sum_c m_c \omega_c` is zero, nobody weighs anything there: the
entry is the mean's, :math:`\sum_c m_c \tau_c`.

A member states :math:`\omega_c` itself: whoever claims large ones decides those entries alone.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcompo.composition.rules.rule import Changes, Rule
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
