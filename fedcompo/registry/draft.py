"""Prepares a change of a registry under its lock: stages files, composes, and commits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fedcompo.composition.fixed_point import Term
from fedcompo.composition.head import joint_head
from fedcompo.composition.version import Recipe, RoundedDifferently, save_realigned, write_version
from fedcompo.errors import ContributionError, RegistryDamaged, RegistryError
from fedcompo.method.contribution import Contribution, mixture_tensors
from fedcompo.method.features import Mixtures
from fedcompo.method.heads import head_tensors
from fedcompo.names import check_client_name
from fedcompo.registry import journal, transaction
from fedcompo.registry.admission import check_contribution, stage_contribution
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.state import Member, State
from fedcompo.report.units import OnStep
from fedcompo.storage.files import REALIGNED, SUM, WEIGHTS
from fedcompo.storage.tensorfile import tensor_digest
from fedcompo.storage.tensorstream import file_sha256

CLIENTS, VERSIONS = "clients", "versions"


@contextmanager
def drafted(registry: RegistryReader, purpose: str, on_step: OnStep) -> Iterator[Draft]:
    """Hold the lock, read the current state, and delete what was staged if an error occurs."""

    def waiting(holder: str) -> None:
        on_step(f"waiting for another writer ({holder})")

    try:
        with transaction.locked(registry.path, purpose, on_wait=waiting):
            try:
                registry.refresh()
                yield Draft(registry, transaction.stage(registry.path), on_step)
            except BaseException:
                with suppress(OSError):  # what was committed is completed now, or at next opening
                    transaction.recover(registry.path)
                raise
            finally:
                registry.refresh()
    except OSError as error:
        raise RegistryError(
            f"The registry {registry.path} could not be changed: {error}. What was not "
            "committed is undone; look at its journal, make room, and try again."
        ) from error


@dataclass
class Draft:
    """A change that is being prepared, under the lock."""

    registry: RegistryReader
    new: Path
    """Folder that mirrors the registry and holds what is new."""
    on_step: OnStep
    before: State = field(init=False)
    entries: list[journal.Entry] = field(init=False)
    moves: list[str] = field(default_factory=list)
    """Staged files and folders, relative to the registry."""
    deletions: list[str] = field(default_factory=list)
    """Files and folders to delete after the commit, relative to the registry."""
    recomposed: bool = False
    """Whether the sum was taken anew."""

    def __post_init__(self) -> None:
        self.before, self.entries = self.registry.state, self.registry.entries()

    @property
    def next_sequence(self) -> int:
        """Number of the journal's next line."""
        return self.before.sequence + 1

    def stage(self, source: Contribution | Path, known: set[str]) -> Member:
        """Copy a contribution, check all of it, and describe it as a member."""
        registry = self.registry
        opened = source if isinstance(source, Contribution) else Contribution.open(source)
        name = check_client_name(str(opened.client))
        self.on_step(f"checking {name}")
        place = f"{CLIENTS}/{name}"
        if name in self.before.members:  # readers still need the old one
            place += f"~{self.next_sequence}"
        if place in self.moves:
            raise ContributionError(f"Two of the contributions are of {name!r}.")
        folder = self.new / place
        staged = stage_contribution(source, folder)
        check_contribution(
            staged,
            theta_shapes=registry.backbone.theta_shapes,
            base=registry.state.base,
            num_features=registry.backbone.num_features,
            members=known,
        )
        self.moves.append(place)
        return Member.of(
            staged,
            folder=place,
            files={path.name: file_sha256(path) for path in sorted(folder.iterdir())},
            statistics_sha256=_statistics_digest(staged),
            added=self.next_sequence,
        )

    def compose(
        self,
        after: State,
        coming: Sequence[Member],
        going: Sequence[Member],
        realigned: Mapping[str, Mixtures] | None = None,
    ) -> State:
        """Write the composition of the new members, continuing the running sum where it can."""
        registry, before = self.registry, self.before
        if before.version:
            self.deletions.append(before.version)
        if not after.members:
            return after
        place = f"{VERSIONS}/{self.next_sequence:06d}"
        folder = self.new / place
        folder.mkdir(parents=True)
        self.on_step("aligning the joint head")
        mixtures = realigned or {c: self._statistics(m) for c, m in after.members.items()}
        head = joint_head(mixtures, after.settings)
        if realigned is not None:
            save_realigned(folder / REALIGNED, realigned)
        changes = [(m, 1) for m in coming] + [(m, -1) for m in going]
        recipe = Recipe(
            registry.backbone,
            [self._term(member, sign) for member, sign in changes],
            registry.running_sum() if before.version else None,
            after.count,
            after.settings.scale,
            head,
            after.linearised,
        )
        digests = self._write(folder, recipe, coming, list(after.members.values()))
        self.moves.append(place)
        members = {
            client: replace(member, rounded_sha256=digests.get(client, member.rounded_sha256))
            for client, member in after.members.items()
        }
        files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
        return replace(after, members=members, version=place, files=files)

    def _write(
        self,
        folder: Path,
        recipe: Recipe,
        coming: Sequence[Member],
        everyone: Sequence[Member],
    ) -> dict[str, str]:
        """Write the version; return the SHA-256 of rounded forms that were not known, by client."""
        self.on_step("composing")
        try:
            rounded = write_version(folder, recipe)
            return {m.client: digest for m, digest in zip(coming, rounded, strict=False)}
        except RoundedDifferently as error:
            self.on_step(f"composing from all members: {error} rounds otherwise on this machine")
            self.recomposed = True
        (folder / SUM).unlink()
        (folder / WEIGHTS).unlink()
        terms = [replace(self._term(member, 1), rounded_sha256="") for member in everyone]
        rounded = write_version(folder, replace(recipe, terms=terms, before=None))
        return {m.client: digest for m, digest in zip(everyone, rounded, strict=True)}

    def _term(self, member: Member, sign: int) -> Term:
        """Return a member's term of the sum; a new member is read from the staged files."""
        if (self.new / member.folder).exists():
            contribution = Contribution.open(self.new / member.folder, with_fisher=False)
        else:
            contribution = self.registry.contribution(member.client)
        times = sign * self.before.settings.times(member.num_examples)
        return Term(member.client, contribution.task_vector, times, member.rounded_sha256)

    def _statistics(self, member: Member) -> Mixtures:
        """Read a member's mixtures alone, and compare them with a digest of their own."""
        staged = self.new / member.folder
        folder = staged if staged.exists() else self.registry.path / member.folder
        contribution = Contribution.open(folder, with_fisher=False)
        if _statistics_digest(contribution) != member.statistics_sha256:
            raise RegistryDamaged(
                f"Head and mixtures in {folder} were altered. Restore the registry from a copy."
            )
        return contribution.features

    def finish(self, after: State, events: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Write the journal's lines and the new state, and commit."""
        outcome: dict[str, Any] = {"root_before": self.before.root, "root_after": after.root}
        if self.recomposed:  # the members' rounded forms are those of this machine now
            outcome["rounded"] = {c: m.rounded_sha256 for c, m in after.members.items()}
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
        )
        self.on_step("writing")
        transaction.commit(self.registry.path, change, after.text)


def _statistics_digest(contribution: Contribution) -> str:
    tensors = head_tensors(contribution.head)
    mixtures = contribution.features.items()
    counts = {f"examples/{name}": torch.tensor(m.num_examples) for name, m in mixtures}
    return tensor_digest(tensors | counts | mixture_tensors(contribution.features))
