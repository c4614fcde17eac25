"""Finds who had or has what was removed, in the journal and in the registry's folder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from fedcompo.composition.lengths import Rounding
from fedcompo.data.tasks import client_of
from fedcompo.errors import FedcompoError
from fedcompo.method.contribution import Contribution
from fedcompo.method.task_vector import NOTHING
from fedcompo.registry.admission import check_features, rounding_of
from fedcompo.registry.company import Company
from fedcompo.registry.history import Stay, stays_in
from fedcompo.registry.journal import Entry
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.rederivation import Finding
from fedcompo.registry.removed import STATISTICS, VECTOR, Removed, statistics_digest
from fedcompo.storage.files import CONTENT


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
        state, stored = registry.state, registry.backbone
        about = state.settings, state.base, stored.num_features, stored.theta_shapes
        self._company = Company(*about, stored.tensors, removed=Removed(registry))
        self._stays: dict[str, list[Stay]] = {}
        asked = {entry.sequence: entry.details.get("requested_by", "") for entry in entries}
        self._askers: dict[float, str] = {line: who for line, who in asked.items() if who}
        members = {Stay(c, m.added): registry.contribution(c) for c, m in state.members.items()}
        for stay in stays_in(entries):
            told, own = stay.values, members.get(stay)
            numbers = told.get("numbers_sha256")
            self._note(stay, *stay.rounded, numbers or "")
            # others may honestly share what is made of a classifier alone
            if not (own.without_images if own else numbers == ""):
                self._note(stay, told["statistics_sha256"])
        for stay, own in members.items():
            rounded = state.members[stay.client].rounded_sha256
            self._note(stay, rounded, statistics_digest(own.statistics))
            if stay.since > derived_since:
                self._note(stay, *self._vector(own))
        for path in strangers:
            if path.name == CONTENT:
                self._look_into(path.parent)

    def findings(
        self, client: str, line: int, content: Mapping[str, str], *, unasked: bool | None = None
    ) -> list[Finding]:
        """Check that nobody has had what a line removed since then, nor has it now.

        Args:
            client: Who was removed.
            line: Number of the journal's line.
            content: The digests, by part; :func:`~fedcompo.registry.removed.content_of`.
            unasked: Whether the claim holds if the client's own came back under its name and the
                journal does not say that the client itself handed it in; None: left open.
        """
        parts = [VECTOR, *(content.keys() - {VECTOR} or [STATISTICS])]
        return [self._finding(p, client, line, content.get(p, ""), unasked) for p in parts]

    def _finding(
        self, part: str, client: str, line: int, digest: str, unasked: bool | None
    ) -> Finding:
        claim, owner = f"nobody has had the {part.replace('_', ' ')} of {client} since", client_of
        if not digest:
            detail = "they are made of a classifier alone, and others may share them"
            return Finding(claim, None, detail)
        known = dict.fromkeys(self._stays.get(digest, ()))
        since = [stay for stay in known if stay.until > line]
        if not since or (part == VECTOR and digest in (NOTHING, self._empty())):
            return Finding(claim, True)
        before = {owner(s.client) for s in known if s.since < line and part != VECTOR}
        others = [stay for stay in since if owner(stay.client) != owner(client)]
        if back := [stay for stay in others if owner(stay.client) not in before]:
            return Finding(claim, False, f"it is back: {', '.join(map(str, back))}")
        if own := [stay for stay in since if stay not in others]:
            if stayed := [stay for stay in own if stay.client == client and stay.since < line]:
                return Finding(claim, False, f"it has not left: {stayed[0]}")
            told, first = ", ".join(map(str, own)), own[0].since
            asker = self._askers.get(first, "nobody who is named")
            told = f"it came back, with line {first}, asked for by {asker}: {told}"
            itself = asker.startswith(f"{owner(client)} (client, certificate ")
            return Finding(claim, None if itself else unasked, told)
        told = ", ".join(map(str, others))
        return Finding(claim, None, f"of the same images are those of {told}, there before it left")

    def _note(self, stay: Stay, *digests: str) -> None:
        for digest in digests:
            self._stays.setdefault(digest, []).append(stay)

    def _look_into(self, folder: Path) -> None:
        """Note the content of a contribution that lies about, as far as it is one."""
        stay = Stay(str(folder), math.inf)
        with suppress(FedcompoError):
            found = Contribution.open(folder, with_fisher=False)
            width, kind = self._company.num_features, self._company.settings.statistics
            check_features(found.statistics, found.head.classes, width, kind, str(folder))
            self._note(stay, statistics_digest(found.statistics))
            vector = found.task_vector  # whatever it says that it was trained on
            vector.check(self._company.shapes, base=vector.base, owner=str(folder))
            self._note(stay, *self._vector(found))

    def _vector(self, own: Contribution) -> list[str]:
        """Digests of a task vector, read again: of its tensors, and rounded if others' are."""
        for _ in own.task_vector.tensors.values():
            pass  # what is read is compared with the digests that the file states
        digests = [own.task_vector.sha256]
        if self._company.removed.by_rounding:
            digests.append(rounding_of(own.client, own.task_vector, self._company).sha256)
        return digests

    def _empty(self) -> str:
        """Digest of a task vector of zeros, rounded, as a client that learnt nothing has one."""
        shapes, rounding = self._company.shapes, Rounding(hashed=True)
        for name, shape in sorted(shapes.items()):
            zeros = torch.zeros(shape.shape, dtype=torch.int64)
            rounding.update(name, zeros, zeros)
        return rounding.sha256
