r"""The sum of the task vectors, exactly, and where its factor comes from.

.. math:: \mathrm{total} = \sum_c m_c\,\tau_c

*mean*: :math:`\lambda` is chosen by the clients' votes, or else keeps the members' length
(:func:`fedcompo.composition.scale.norm_preserving`), as *norm-preserving* always does.
Source: Porrello et al., ICLR 2025 (arXiv 2405.16350).

*task-arithmetic*: the factor does not change with the members. Whoever joins adds its share and
changes nobody else's. Where everybody counts once, the factor is the source's, in which 0.3 does
well with 8 tasks.
Source: Ilharco et al., *Editing Models with Task Arithmetic*, ICLR 2023 (arXiv 2212.04089).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedcompo.composition.rules.rule import Changes, Removal, Rule
from fedcompo.config.setting import setting


@dataclass(frozen=True)
class Mean(Rule):
    """The sum itself, bit for bit; one pass."""

    name: ClassVar[str] = "mean"
    removal: ClassVar[Removal] = Removal.SUM
    is_sum: ClassVar[bool] = True

    def total(self, changes: Changes) -> Tensor:
        """Return the sum."""
        return changes.sum()

    def on_grid(self, changes: Changes) -> Tensor:
        """Return the sum in whole numbers, never rounded where members count whole times."""
        return changes.exact_sum() if changes.whole else super().on_grid(changes)


@dataclass(frozen=True)
class NormPreserving(Mean):
    """The sum, with a factor that follows from lengths."""

    name: ClassVar[str] = "norm-preserving"
    votes: ClassVar[bool] = False


@dataclass(frozen=True)
class TaskArithmetic(Mean):
    """The sum, with a factor of its own."""

    name: ClassVar[str] = "task-arithmetic"
    votes: ClassVar[bool] = False
    lambda_: float = setting(
        0.3, "Factor on the plain sum.", (lambda value: 0 < value <= 10, "must be in (0, 10]")
    )

    @property
    def factor(self) -> float:
        r"""Return :math:`\lambda`."""
        return self.lambda_
