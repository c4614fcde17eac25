r"""Task arithmetic: the plain sum, times one number.

.. math:: \theta_P = \theta_0 + \lambda \sum_c m_c\,\tau_c

The number does not change with the members: whoever joins adds its share and changes nobody
else's. Source: Ilharco et al., ICLR 2023 (arXiv 2212.04089), where 0.3 does well with 8 tasks.
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
    lambda_: float = setting(
        0.3, "Factor on the plain sum.", (lambda value: 0 < value <= 10, "must be in (0, 10]")
    )

    @property
    def factor(self) -> float:
        r"""Return :math:`\lambda`: where everybody counts once, it is that of the paper."""
        return self.lambda_
