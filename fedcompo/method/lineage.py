"""Whose data shaped a contribution: an influence that only a new training undoes; no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedcompo.storage.files import tuples


@dataclass(frozen=True)
class Lineage:
    """Other clients whose data shaped a contribution, by name."""

    method: str = "ita"
    anchored_by: tuple[str, ...] = ()
    """Clients whose Fisher anchored the training."""
    aligned_with: tuple[str, ...] = ()
    """Clients whose feature statistics are in the joint head that it was trained under: from which
    training started, or whose class probabilities its Fisher is of."""
    ensemble: tuple[str, ...] = ()
    """Clients whose task vectors were in the model that was trained."""

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Lineage:
        """Rebuild a lineage from JSON; raises ``TypeError`` if the names of its fields differ."""
        return cls(**tuples(values))

    def joined(self, later: Lineage, *, ensemble: Iterable[str] = ()) -> Lineage:
        """This lineage and that of a later round of the same training; the method stays.

        The ensemble names further clients whose task vectors were in the later round's model.
        """
        return replace(
            self,
            anchored_by=tuple(sorted({*self.anchored_by, *later.anchored_by})),
            aligned_with=tuple(sorted({*self.aligned_with, *later.aligned_with})),
            ensemble=tuple(sorted({*self.ensemble, *later.ensemble, *ensemble})),
        )

    @property
    def shaped_by(self) -> set[str]:
        """All other clients whose data shaped the contribution."""
        return {*self.anchored_by, *self.aligned_with, *self.ensemble}
