"""Whose data shaped a contribution: what a removal cannot undo without training again; no torch."""

from __future__ import annotations

from dataclasses import dataclass


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
