r"""Fisher-weighted: each entry is averaged by how much it matters to each member.

The weights of :mod:`fedcompo.composition.rules.weighted` are the Fisher diagonal that the member
sends for its anchor (:meth:`~fedcompo.method.fisher.FisherDiagonal.diagonal_of`). In the default
form, ``factored``, it is of rank one: row sums times column sums over the root of both totals. Then
whose entry counts is known by row and by column, not for each entry by itself. It is taken at
:math:`\theta_0`, of the features or of the class probabilities (``curvature``); in the source at
each member's own weights, of the class probabilities. Source: Matena & Raffel, *Merging Models with
Fisher-Weighted Averaging*, NeurIPS 2022 (arXiv 2111.09832).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedcompo.composition.rules.weighted import Weighted
from fedcompo.config.choices import Curvature
from fedcompo.config.run import RunConfig
from fedcompo.errors import ContributionError
from fedcompo.method.contribution import Contribution
from fedcompo.method.fisher import FisherDiagonal


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
