"""Whose data shaped a contribution: what only training again can undo; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedcompo.storage.files import tuples


@dataclass(frozen=True)
class Lineage:
    """Whose data a contribution was made with, besides the client's own; names of clients."""

    method: str = "ita"
    anchored_by: tuple[str, ...] = ()
    """Clients whose Fisher anchored the training."""
    aligned_with: tuple[str, ...] = ()
    """Clients whose feature statistics shaped the head that training started from."""
    ensemble: tuple[str, ...] = ()
    """Clients whose task vectors were in the model that was trained."""

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Lineage:
        """Rebuild a lineage from JSON; raises ``TypeError`` if the names of its fields differ."""
        return cls(**tuples(values))

    @property
    def shaped_by(self) -> set[str]:
        """All other clients whose data shaped the contribution."""
        return {*self.anchored_by, *self.aligned_with, *self.ensemble}
