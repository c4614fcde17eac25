"""Finds who had or has what was removed, in the journal and in the registry's folder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedcompo.composition.fixed_point import Rounding, rounded
from fedcompo.data.tasks import client_of
from fedcompo.errors import FedcompoError
from fedcompo.method.contribution import Contribution
from fedcompo.registry.journal import Entry
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.rederivation import Finding
from fedcompo.registry.removed import STATISTICS, VECTOR, content_of, statistics_digest
from fedcompo.storage.files import CONTENT


@dataclass(frozen=True)
class Stay:
    """A contribution's time in the registry, in numbers of lines of the journal."""

    client: str
    """Or the folder of a contribution that lies about."""
    since: float
    """Infinite: the journal does not know it."""
    until: float = math.inf
    """Line that removed it; infinite: it is there."""

    def __str__(self) -> str:
        """Who it is, and when."""
        if self.since == math.inf:
            return self.client
        end = "" if self.until == math.inf else f" to {self.until}"
        return f"{self.client} (line {self.since}{end})"


class Comebacks:
    """Who had or has a task vector or statistics, by their digests."""

    def __init__(
        self,
        registry: RegistryReader,
        entries: Sequence[Entry],
        *,
        derived_since: float = math.inf,
        strangers: Iterable[Path] = (),
    ) -> None:
        """Replay the journal, and read the statistics of those who are there.

        Args:
            registry: The registry.
            entries: Its journal.
            derived_since: The task vectors of members that came after this line are read too; what
                the journal says of the others is covered by the root of that line.
            strangers: Files in the registry's folder that it does not know.
        """
        self._registry = registry
        self._stays: dict[str, list[Stay]] = {}
        asked = {entry.sequence: entry.details.get("requested_by", "") for entry in entries}
        self._askers: dict[float, str] = {line: who for line, who in asked.items() if who}
        self._replay(entries)
        for client, member in registry.state.members.items():
            stay, own = Stay(client, member.added), registry.contribution(client)
            if own.without_images:  # it may honestly share what an old line says of others
                same = self._stays.get(member.statistics_sha256, [])
                same[:] = [other for other in same if other != stay]
            self._note(stay, member.rounded_sha256, statistics_digest(own.statistics))
            if member.added > derived_since:
                self._note(stay, self._rounded(own))
        for path in strangers:
            if path.name == CONTENT:
                self._look_into(path.parent)

    def finding(self, part: str, client: str, line: int, content: Mapping[str, str]) -> Finding:
        """Check that nobody has had a part of what a line removed since then, nor has it now.

        Args:
            part: One of the parts that :mod:`fedcompo.registry.removed` names.
            client: Who was removed.
            line: Number of the journal's line.
            content: The digests, by part.
        """
        claim = f"nobody has had the {part.replace('_', ' ')} of {client} since"
        if not (digest := content.get(part, "")):
            detail = "they are made of a classifier alone, and others may share them"
            return Finding(claim, None, detail)
        known = {stay: client_of(stay.client) for stay in self._stays.get(digest, ())}
        stays = [stay for stay in known if stay.until > line]
        if not stays or (part == VECTOR and digest == self._empty()):
            return Finding(claim, True)
        before = {known[stay] for stay in known if stay.since < line and part != VECTOR}
        own = [stay for stay in stays if known[stay] == client_of(client)]
        twins = [stay for stay in stays if known[stay] in before - {client_of(client)}]
        if back := [stay for stay in stays if stay not in [*own, *twins]]:
            return Finding(claim, False, f"it is back: {', '.join(map(str, back))}")
        if stayed := [stay for stay in own if stay.client == client and stay.since < line]:
            return Finding(claim, False, f"it has not left: {stayed[0]}")
        if own:
            told, first = ", ".join(map(str, own)), own[0].since
            asker = self._askers.get(first, "nobody who is named")
            told = f"it came back, with line {first}, asked for by {asker}: {told}"
            return Finding(claim, None, told)
        told = ", ".join(map(str, twins))
        return Finding(claim, None, f"of the same images are those of {told}, there before it left")

    def findings(self, client: str, line: int, content: Mapping[str, str]) -> list[Finding]:
        """Check the same for all parts."""
        parts = [VECTOR, *(content.keys() - {VECTOR} or [STATISTICS])]
        return [self.finding(part, client, line, content) for part in parts]

    def _replay(self, entries: Sequence[Entry]) -> None:
        gone = [entry for entry in entries if entry.event == "removed"]
        ends = {(e.details["client"], e.details["added"]): e.sequence for e in gone}
        stays: dict[str, Stay] = {}
        for entry in entries:
            for own in entry.details["clients"] if entry.event == "added" else ():
                until = ends.get((own["client"], entry.sequence), math.inf)
                stays[own["client"]] = stay = Stay(own["client"], entry.sequence, until)
                self._note(stay, own["rounded_sha256"], own["statistics_sha256"])
            for client, digest in entry.details.get("rounded", {}).items():
                self._note(stays[client], digest)
            leaving = entry.details["client"] if entry.event == "removed" else ""
            if stay := stays.pop(leaving, None):
                self._note(stay, *content_of(entry.details).values())

    def _note(self, stay: Stay, *digests: str) -> None:
        for digest in digests:
            self._stays.setdefault(digest, []).append(stay)

    def _look_into(self, folder: Path) -> None:
        """Note the content of a contribution that lies about."""
        try:
            found = Contribution.open(folder, with_fisher=False)
            digests = self._rounded(found), statistics_digest(found.statistics)
        except FedcompoError:  # it is none, so nothing can be said of it
            return
        self._note(Stay(str(folder), math.inf), *digests)

    def _rounded(self, contribution: Contribution) -> str:
        weights, rounding = self._registry.backbone.tensors, Rounding()
        for name in sorted(self._registry.backbone.target_weights):
            owner = f"client {contribution.client!r}"
            values = rounded(contribution.task_vector, name, weights[name], owner=owner)
            rounding.update(name, values, weights[name])
        return rounding.sha256

    def _empty(self) -> str:
        """Digest of a task vector of zeros, as a client that learnt nothing has one."""
        shapes, rounding = self._registry.backbone.theta_shapes, Rounding()
        for name, shape in sorted(shapes.items()):
            zeros = torch.zeros(shape.shape, dtype=torch.int64)
            rounding.update(name, zeros, zeros)
        return rounding.sha256
