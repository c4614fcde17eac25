"""Norm-preserving: the mean, always as long as its members.

See :func:`fedcompo.composition.scale.norm_preserving`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedcompo.composition.rules.mean import Mean


@dataclass(frozen=True)
class NormPreserving(Mean):
    """The sum, with a factor that follows from lengths."""

    name: ClassVar[str] = "norm-preserving"
    votes: ClassVar[bool] = False
