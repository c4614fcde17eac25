r"""Task arithmetic: the plain sum with a factor that does not change with the members.

Whoever joins adds its share and changes nobody else's. Where everybody counts once, the factor is
the source's, in which 0.3 does well with 8 tasks.
Source: Ilharco et al., *Editing Models with Task Arithmetic*, ICLR 2023 (arXiv 2212.04089).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedcompo.composition.rules.mean import Mean
from fedcompo.config.setting import setting


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
