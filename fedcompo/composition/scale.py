r"""The factor on the sum of task vectors, and where it comes from.

.. math:: \theta_P = \theta_0 + \lambda' \sum_c m_c\,\tau_c, \qquad
   \lambda' = \lambda / M, \qquad M = \sum_c m_c

The *scale* :math:`\lambda` is a multiple of the weighted mean; at :math:`\lambda = M` the model is
the plain sum, if every client counts once. The *factor* :math:`\lambda'` does not depend on who is
there: where it is kept, a client that leaves changes nobody else's share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

FACTOR_DIGITS = 4
"""Significant digits of a factor that is computed from lengths."""


class FactorBy(StrEnum):
    """Where a factor comes from."""

    FIXED = "fixed"
    """The registry's `scale`, divided by M."""
    VOTE = "vote"
    """The clients chose it on images that they did not train on; it stays when members change."""
    RULE = "rule"
    """The rule of composition says it; it stays when members change."""
    NORMS = "norms"
    """It keeps the length of the task vectors; see :func:`norm_preserving`."""


@dataclass(frozen=True)
class Factor:
    """A factor and where it comes from."""

    value: float
    r""":math:`\lambda'`."""
    by: FactorBy


def norm_preserving(lengths: Mapping[str, tuple[float, float]], squared_sum: float) -> float:
    r"""Compute the factor at which the composed change is as long as the mean task vector.

    .. math:: \lambda = \frac{\sqrt{M \sum_c m_c \lVert\tau_c\rVert^2}}
              {\lVert\sum_c m_c \tau_c\rVert}, \qquad \lambda' = \lambda / M

    Task vectors that are alike give 1 for :math:`\lambda`, orthogonal ones of one length the root
    of their number. Beyond the plain sum, :math:`\lambda` equal to the number of clients, it does
    not go: task vectors that cancel out are not blown up. It is rounded to four significant digits,
    so that no machine's last bit counts.

    Args:
        lengths: :math:`m_c` and :math:`\lVert\tau_c\rVert^2` by client; at least one.
        squared_sum: :math:`\lVert\sum_c m_c \tau_c\rVert^2`.

    Returns:
        :math:`\lambda'`; :math:`1/M` if the sum is zero.
    """
    together = math.fsum(times for times, _ in lengths.values())
    if not squared_sum > 0:
        return 1 / together
    energy = math.fsum(times * squared for times, squared in lengths.values())
    factor = math.sqrt(energy / together / squared_sum)
    return significant(min(factor, len(lengths) / together), FACTOR_DIGITS)


def significant(value: float, digits: int) -> float:
    """Round to a number of significant digits."""
    return float(f"{value:.{digits - 1}e}")
