"""Whose data clients' task vectors have seen in their rounds: it adds up, round by round."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fedcompo.config.choices import Method
from fedcompo.method.lineage import Lineage


@dataclass
class Trace:
    """Names, for one client."""

    anchored_by: set[str] = field(default_factory=set)
    aligned_with: set[str] = field(default_factory=set)
    ensemble: set[str] = field(default_factory=set)

    def see(self, lineage: Lineage, inside: Iterable[str] = ()) -> None:
        """Add what a training was done with.

        Args:
            lineage: Of that training.
            inside: Whose task vectors were in the sum besides.
        """
        self.anchored_by |= set(lineage.anchored_by)
        self.aligned_with |= set(lineage.aligned_with)
        self.ensemble |= {*lineage.ensemble, *inside}

    @property
    def lineage(self) -> Lineage:
        """All of it."""
        return Lineage(
            method=str(Method.IEL),
            anchored_by=tuple(sorted(self.anchored_by)),
            aligned_with=tuple(sorted(self.aligned_with)),
            ensemble=tuple(sorted(self.ensemble)),
        )
