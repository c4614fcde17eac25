"""Prepares a change of a registry under its lock: stages files, composes, and commits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fedcompo.composition import version
from fedcompo.composition.fixed_point import Term
from fedcompo.composition.head import SHRINKAGE, head_from_total, joint_head
from fedcompo.composition.realigned import realigned_head, save_realigned
from fedcompo.composition.scale import Factor, FactorBy, norm_preserving
from fedcompo.composition.totals import check_alike, save_total, total_after
from fedcompo.config.choices import Statistics
from fedcompo.errors import (
    ContributionError,
    FileFormatError,
    RegistryDamaged,
    RegistryError,
    blaming,
)
from fedcompo.method.contribution import AnyStatistics, Contribution, counts_of, statistics_tensors
from fedcompo.method.heads import Head, head_tensors
from fedcompo.method.statistics import FeatureSums
from fedcompo.names import check_client_name
from fedcompo.registry import journal, transaction
from fedcompo.registry.admission import check_parts
from fedcompo.registry.company import Company
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.removed import Removed, vector_digest
from fedcompo.registry.staging import stage_contribution
from fedcompo.registry.state import Member, State
from fedcompo.report.progress import step
from fedcompo.storage.digests import tensor_digest
from fedcompo.storage.files import REALIGNED, SUM, TOTALS
from fedcompo.storage.identity import identity

CLIENTS, VERSIONS = "clients", "versions"


def opened(source: Contribution | Path) -> Contribution:
    """Open a contribution, if it is not open yet."""
    return source if isinstance(source, Contribution) else Contribution.open(source)


@contextmanager
def drafted(registry: RegistryReader, purpose: str) -> Iterator[Draft]:
    """Hold the lock, read the current state, and delete what was staged but not committed."""
    try:
        with transaction.locked(registry.path, purpose):
            try:
                registry.refresh()
                yield Draft(registry, transaction.stage(registry.path))
            finally:
                with suppress(OSError):  # what was committed is completed now, or at next opening
                    transaction.recover(registry.path)
                registry.refresh()
    except OSError as error:
        raise RegistryError(
            f"The registry {registry.path} could not be changed: {error}. What was not "
            "committed is undone; look at its journal, make room, and try again."
        ) from error


@dataclass(frozen=True)
class Realignment:
    """Of what a joint head is made again."""

    statistics: Mapping[str, AnyStatistics] | FeatureSums
    """Of the composed model's features, by client, or their sum."""
    factor: float | None = None
    """New factor; None: the present one."""


@dataclass
class Draft:
    """A change that is being prepared, under the lock."""

    registry: RegistryReader
    new: Path
    """Folder that mirrors the registry and holds what is new."""
    before: State = field(init=False)
    entries: list[journal.Entry] = field(init=False)
    moves: list[str] = field(default_factory=list)
    """Staged files and folders, relative to the registry."""
    deletions: list[str] = field(default_factory=list)
    """Files and folders to delete after the commit, relative to the registry."""
    exchanges: list[str] = field(default_factory=list)
    """Staged files that take the place of others, relative to the registry."""
    norms: dict[str, float] = field(default_factory=dict)
    """Squared lengths of the task vectors that are new in the sum, by client."""

    def __post_init__(self) -> None:
        self.before, self.entries = self.registry.state, self.registry.entries()

    @property
    def next_sequence(self) -> int:
        """Number of the journal's next line."""
        return self.before.sequence + 1

    def stage(self, source: Contribution | Path, company: Company) -> Member:
        """Copy a contribution, check all but the length of its change, and describe a member."""
        name = check_client_name(str(opened(source).client))
        step(f"checking {name}")
        place = f"{CLIENTS}/{name}"
        if name in self.before.members:  # readers still need the old one
            place += f"~{self.next_sequence}"
        if place in self.moves:
            raise ContributionError(f"Two of the contributions are of {name!r}.")
        folder = self.new / place
        staged = stage_contribution(source, folder)
        with blaming(name):
            check_parts(staged, company)
        self.moves.append(place)
        return Member(
            client=staged.client,
            folder=place,
            kind=str(staged.task_vector.kind),
            num_examples=staged.num_examples,
            classes=staged.head.classes,
            files={path.name: identity(path) for path in sorted(folder.iterdir())},
            statistics_sha256=_statistics_digest(staged),
            rounded_sha256="",
            lineage=staged.lineage,
            added=self.next_sequence,
        )

    def compose(
        self,
        after: State,
        coming: Sequence[Member],
        going: Sequence[Member],
        realigned: Realignment | None = None,
    ) -> State:
        """Write the composition of the new members, continuing sums where it can."""
        if self.before.version:
            self.deletions.append(self.before.version)
        if not after.members:
            return replace(after, factor=0.0, factor_by="", shrinkage=None)
        place = f"{VERSIONS}/{self.next_sequence:06d}"
        folder = self.new / place
        folder.mkdir(parents=True)
        step("composing")
        after, squared_norm = self._add_up(folder, after, coming, going)
        if not after.settings.made_by.is_sum:
            squared_norm = self._ruled(folder, after, changed=bool(coming or going))
        factor = self._factor(after, squared_norm, realigned)
        step("aligning the joint head")
        shrinkage = SHRINKAGE if self._of_sums else None
        after = replace(after, factor=factor.value, factor_by=factor.by, shrinkage=shrinkage)
        head = self._head(folder, after, coming, going, realigned)
        version.write_composed(
            folder,
            self.registry.backbone,
            head,
            factor=factor.value,
            linearised=after.linearised,
            about=after.about,
        )
        self.moves.append(place)
        files = {path.name: identity(path) for path in sorted(folder.iterdir())}
        return replace(after, version=place, files=files)

    def _add_up(
        self, folder: Path, after: State, coming: Sequence[Member], going: Sequence[Member]
    ) -> tuple[State, float]:
        """Write the running sum; return the members with what is known of them, and its length."""
        path, backbone = folder / SUM, self.registry.backbone
        times = after.settings.times
        hashed = bool(coming) and Removed(self.registry).by_rounding
        terms = [replace(self._term(m, times(m.num_examples)), is_new=True) for m in coming]
        terms += [self._term(m, -times(m.num_examples)) for m in going]
        before = self.registry.running_sum() if self.before.version else None
        roundings, squared_norm = version.write_sum(
            path, backbone, terms, count=after.count, before=before, hashed=hashed
        )
        members = dict(after.members)
        for member, term, rounding in zip(coming, terms, roundings, strict=False):  # others go
            self.norms[member.client] = norm = rounding.squared_norm
            measured = self._of_sums or bool(after.settings.max_norm_ratio)
            members[member.client] = replace(
                member,
                rounded_sha256=vector_digest(term.vector, rounding),
                squared_norm=norm if measured else None,
            )
        return replace(after, members=members), squared_norm

    def _ruled(self, folder: Path, after: State, *, changed: bool) -> float:
        """Write the rule's total, of all members if it takes them; returns its squared length."""
        rule, everyone = after.settings.made_by, after.members.values()
        step(f"composing by {rule.text}, {rule.removal} in the number of members")
        needed = everyone if changed and rule.removal == "O(T)" else ()
        members = [self.opened(member, with_fisher=bool(rule.needs)) for member in needed]
        times = {m.client: after.settings.times(m.num_examples) for m in everyone}
        backbone, same = self.registry.backbone, None if changed else self.registry.total()
        return version.write_ruled(folder, backbone, after.settings, members, times, same=same)

    def _factor(self, after: State, squared_norm: float, realigned: Realignment | None) -> Factor:
        """Return the factor: of the rule, fixed, voted now or before, or computed from lengths."""
        chosen = realigned.factor if realigned is not None else None
        voted = self.registry.kept_factor if chosen is None else chosen
        known = after.settings.known_factor(after.count, voted)
        return known or Factor(norm_preserving(after.lengths, squared_norm), FactorBy.NORMS)

    def _head(
        self,
        folder: Path,
        after: State,
        coming: Sequence[Member],
        going: Sequence[Member],
        realigned: Realignment | None,
    ) -> Head:
        """Write statistics; return the joint head."""
        if self._of_sums:
            before = self.registry.total_statistics() if self.before.version else None
            newcomers, gone = ([self.opened(m) for m in some] for some in (coming, going))
            for new in newcomers:
                members = map(self.opened, self.before.members.values())
                with blaming(new.client):
                    check_alike(new.client, new.statistics, before, members)
            total = total_after(before, newcomers, gone, after.settings)
            save_total(folder / TOTALS, total)
        if realigned is not None:
            save_realigned(folder / REALIGNED, realigned.statistics)
            return realigned_head(folder / REALIGNED, after.settings, after.shrinkage)
        if self._of_sums:
            return head_from_total(total, after.shrinkage)
        mixtures = {c: self._statistics(m) for c, m in after.members.items()}
        return joint_head(mixtures, after.settings)

    @property
    def _of_sums(self) -> bool:
        """Whether members describe their features by sums."""
        return self.before.settings.statistics is Statistics.SUMS

    def opened(self, member: Member, *, with_fisher: bool = False) -> Contribution:
        """Open a member's contribution; a new one is read from the staged files."""
        if (staged := self.new / member.folder).exists():
            return Contribution.open(staged, with_fisher=with_fisher)
        return self.registry.contribution(member.client, with_fisher=with_fisher)

    def _term(self, member: Member, times: int) -> Term:
        """Return a member's term of the sum."""
        vector = self.opened(member).task_vector
        return Term(member.client, vector, times)

    def _statistics(self, member: Member) -> AnyStatistics:
        """Read a member's statistics alone, and compare them with a digest of their own."""
        staged = self.new / member.folder
        folder = staged if staged.exists() else self.registry.path / member.folder
        with suppress(FileFormatError):
            contribution = Contribution.open(folder, with_fisher=False)
            if _statistics_digest(contribution) == member.statistics_sha256:
                return contribution.statistics
        raise RegistryDamaged(
            f"Head and mixtures in {folder} were altered. Restore the registry from a copy."
        )

    def finish(self, after: State, events: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Write the journal's lines and the new state, and commit."""
        roots = {"root_before": self.before.root, "root_after": after.root}
        outcome: dict[str, Any] = {**roots, **after.chosen}
        *first, (event, details) = events
        entries = journal.follow(self.entries[-1], [*first, (event, {**details, **outcome})])
        after = replace(after, sequence=entries[-1].sequence, journal_sha256=entries[-1].sha256)
        size = sum(len(entry.line.encode()) + 1 for entry in self.entries)
        change = transaction.Change(
            moves=tuple(self.moves),
            journal_size=size,
            journal_lines=tuple(entry.line for entry in entries),
            deletions=tuple(path for path in self.deletions if path not in after.kept),
            model=after.version,
            exchanges=tuple(self.exchanges),
        )
        step("writing")
        transaction.commit(self.registry.path, change, after.text)
        self.registry.state = after  # what is read again is the same


def _statistics_digest(contribution: Contribution) -> str:
    tensors = head_tensors(contribution.head)
    counts = counts_of(contribution.statistics).items()
    tensors |= {f"examples/{name}": torch.tensor(count) for name, count in counts}
    return tensor_digest(tensors | statistics_tensors(contribution.statistics))
