r"""The mean: the sum of the task vectors, exactly.

.. math:: \mathrm{total} = \sum_c m_c\,\tau_c

:math:`\lambda` is chosen by the clients' votes, or else keeps the members' length
(:func:`fedcompo.composition.scale.norm_preserving`).
Source: Porrello et al., ICLR 2025 (arXiv 2405.16350).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fedcompo.composition.rules.rule import Changes, Rule


@dataclass(frozen=True)
class Mean(Rule):
    """The sum itself, bit for bit; one pass."""

    name: ClassVar[str] = "mean"
    removal: ClassVar[Literal["O(1)", "O(T)"]] = "O(1)"
    is_sum: ClassVar[bool] = True

    def total(self, changes: Changes) -> Tensor:
        """Return the sum."""
        return changes.sum()

    def on_grid(self, changes: Changes) -> Tensor:
        """Return the sum in whole numbers, never rounded where members count whole times."""
        return changes.exact_sum() if changes.whole else super().on_grid(changes)
