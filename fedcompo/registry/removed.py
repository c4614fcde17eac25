"""Refuses what was removed and comes back under another name.

It is known by digests that hold no name of a client or a class: of a task vector, and of the
numbers of statistics. A client may bring back its own, under its name or another of its members'.
:data:`~fedcompo.registry.removal.LIMITS` says what digests cannot find.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcompo.composition.lengths import Rounding
from fedcompo.data.tasks import client_of
from fedcompo.errors import ContributionError
from fedcompo.method.contribution import AnyStatistics, Contribution
from fedcompo.method.statistics import FeatureSums
from fedcompo.method.task_vector import NOTHING, TENSORS, TaskVector
from fedcompo.registry import journal
from fedcompo.registry.history import stays_in
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.transaction import JOURNAL

VECTOR, STATISTICS, OLD_STATISTICS = "task_vector", "statistics", "statistics_and_names"
"""Parts of a contribution that have a digest. The last one is that of earlier versions: it covers
head and names too, so it finds less."""


def statistics_digest(statistics: AnyStatistics) -> str:
    """SHA-256 of statistics, whatever their classes are called and however they are ordered."""
    if isinstance(statistics, FeatureSums):
        parts = [*_rows(statistics.counts, statistics.sums), statistics.second.numpy().tobytes()]
    else:
        parts = sorted(
            b"".join([b"%d:" % own.num_examples, *_rows(own.weights, own.means, own.variances)])
            for own in statistics.values()
        )
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _rows(first: Tensor, *others: Tensor) -> list[bytes]:
    """Lines of tables that stand side by side, sorted; numbers that are equal are so bit by bit."""
    table = torch.cat([first.unsqueeze(1), *others], dim=1)
    table = table.double() + 0.0 if table.is_floating_point() else table
    return sorted(row.numpy().tobytes() for row in table)


def vector_digest(vector: TaskVector, rounding: Rounding) -> str:
    """What a registry knows a task vector by: its tensors, or its rounded form if it is hashed."""
    return rounding.sha256 or (vector.sha256 if rounding.squared_norm else NOTHING)


def numbers_of(own: Contribution) -> str:
    """What the journal keeps of a contribution's statistics when it is removed.

    Empty if they are made of a classifier alone: two honest clients may share them.
    """
    return "" if own.without_images else statistics_digest(own.statistics)


def content_of(details: Mapping[str, Any]) -> dict[str, str]:
    """Digests of what a line of the journal removed, by part; those that are known."""
    content = {VECTOR: details["rounded_sha256"]}
    if "numbers_sha256" in details:
        content[STATISTICS] = details["numbers_sha256"]
    else:
        content[OLD_STATISTICS] = details["statistics_sha256"]
    return {part: digest for part, digest in content.items() if digest}


@dataclass(frozen=True)
class Removed:
    """What a registry knows as removed."""

    registry: RegistryReader | None = None
    """None: there is none, so nothing was removed."""
    leaving: Sequence[Mapping[str, Any]] = ()
    """What the journal will say of members that the same change removes."""

    def refuse(self, client: str, what: str, *digests: str) -> None:
        """Refuse a newcomer's content that was removed under the name of another client.

        Args:
            client: The newcomer.
            what: Its content, for the error.
            digests: Of this content.

        Raises:
            ContributionError: Names whose it is, and what to do.
        """
        if self.registry is None:
            return
        state = self.registry.state
        past, _ = _past(self.registry.path / JOURNAL, state.sequence, state.journal_sha256)
        coming = ((own["client"], {*content_of(own).values()}) for own in self.leaving)
        known = [*past, *coming]
        owners = [owner for owner, content in known if not content.isdisjoint(digests)]
        if not owners or client_of(client) in map(client_of, owners) or self._had(client, digests):
            return
        raise ContributionError(
            f"Client {client!r} brings, number for number, the {what} of {owners[-1]!r}, which the "
            f"registry has removed. Add it as {owners[-1]!r}, who may come back, or train "
            f"{client!r} on images of its own. Was {owners[-1]!r} a mistyped name? Then keep it, "
            "or make a new registry (`fedcompo create`) and add everyone there."
        )

    @property
    def by_rounding(self) -> bool:
        """Whether task vectors are compared on the grid of the running sum: earlier versions did.

        Then those that come are, too: in one registry all digests are of one kind.
        """
        if self.registry is None:
            return False
        state = self.registry.state
        return _past(self.registry.path / JOURNAL, state.sequence, state.journal_sha256)[1]

    def _had(self, client: str, digests: Sequence[str]) -> bool:
        """Whether a member has these statistics already: of the same images, all along."""
        registry = self.registry
        if registry is None or client not in registry.clients:
            return False
        own = statistics_digest(registry.contribution(client).statistics)
        return own in digests or registry.member(client).statistics_sha256 in digests


@lru_cache(maxsize=4)
def _past(path: Path, sequence: int, sha256: str) -> tuple[list[tuple[str, set[str]]], bool]:
    """Read who was removed with what, and whether one was rounded, once for each journal."""
    stays = stays_in(journal.read(path, upto=sequence))
    gone = (stay for stay in stays if stay.until < math.inf)
    content = [(own.client, {*own.rounded, *content_of(own.values).values()}) for own in gone]
    return content, not all(own.rounded[0].startswith(TENSORS) for own in stays)
