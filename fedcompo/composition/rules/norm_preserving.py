r"""The mean at the length of its members, whatever the clients would vote.

.. math:: \lambda' = \frac{\sqrt{\sum_c m_c \lVert\tau_c\rVert^2 / M}}
                          {\lVert\sum_c m_c \tau_c\rVert}

See :func:`fedcompo.composition.scale.norm_preserving`, which every rule falls back on where nobody
votes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedcompo.composition.rules.mean import Mean


@dataclass(frozen=True)
class NormPreserving(Mean):
    """The sum, with a factor that follows from lengths."""

    name: ClassVar[str] = "norm-preserving"

    @property
    def votes(self) -> bool:
        """Return False: lengths say the factor."""
        return False
