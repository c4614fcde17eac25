"""How a registry changes: who comes, who goes, and the composition that follows from it.

Every change is one transaction: stage, check, compose, commit. The cost of a change is that of the
contributions that come and go, never of those that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcompo import composition, journal, transaction
from fedcompo.admission import check_contribution, stage_contribution
from fedcompo.composition import REALIGNED, SUM, Mixtures, RoundedDifferently, Term
from fedcompo.contribution import Contribution, Lineage, mixture_tensors
from fedcompo.errors import ContributionError, RegistryDamaged, RegistryError
from fedcompo.export import WEIGHTS
from fedcompo.names import check_client_name
from fedcompo.pool import require_known
from fedcompo.registry_state import Member, State
from fedcompo.removal import Influence, RemovalRecord, influence
from fedcompo.tensorfile import tensor_digest, tuples
from fedcompo.tensorstream import file_sha256

if TYPE_CHECKING:
    from fedcompo.registry import Registry

CLIENTS, VERSIONS, REMOVALS = "clients", "versions", "removals"

OnStep = Callable[[str], None]


@dataclass
class _Draft:
    """A change in the making, under the lock."""

    registry: Registry
    new: Path
    """Folder that mirrors the registry and holds what is new."""
    on_step: OnStep
    before: State = field(init=False)
    entries: list[journal.Entry] = field(init=False)
    moves: list[str] = field(default_factory=list)
    deletions: list[str] = field(default_factory=list)
    recomposed: bool = False

    def __post_init__(self) -> None:
        self.before, self.entries = self.registry.state, self.registry.entries()

    @property
    def next_sequence(self) -> int:
        return self.before.sequence + 1


def add(
    registry: Registry,
    sources: Sequence[Contribution | Path],
    *,
    replacing: bool,
    on_step: OnStep,
) -> None:
    """Add contributions, all or none; see :meth:`fedcompo.registry.Registry.add`."""
    if not sources:
        raise ContributionError("There is nothing to add; name at least one contribution.")
    with _drafted(registry, f"adding {len(sources)} contribution(s)", on_step) as draft:
        state = draft.before
        coming: dict[str, Member] = {}
        for source in sources:
            member = _stage(draft, source, {*state.members, *coming})
            if member.client in state.members and not replacing:
                raise ContributionError(
                    f"Client {member.client!r} is in the registry {registry.path} already. "
                    "Replace it explicitly (`--replace`, `replace = true`), which is a removal and "
                    "an addition, or give the newcomer another name."
                )
            coming[member.client] = member
        gone = [state.members[client] for client in coming if client in state.members]
        line = draft.next_sequence + len(gone)  # each of them has a line of its own before
        coming = {client: replace(member, added=line) for client, member in coming.items()}
        after = _with_members(state, {**state.members, **coming})
        after = _compose(draft, after, coming=list(coming.values()), going=gone)
        events = [("removed", {**_essence(member), "within": "replacement"}) for member in gone]
        events.append(
            ("added", {"clients": [_essence(after.members[client]) for client in sorted(coming)]})
        )
        draft.deletions += [member.folder for member in gone]
        _finish(draft, after, events)


def remove(
    registry: Registry,
    client: str,
    *,
    requested_by: str,
    reason: str,
    keep_versions: bool,
    on_step: OnStep,
) -> RemovalRecord:
    """Remove a client; see :meth:`fedcompo.registry.Registry.remove`."""
    with _drafted(registry, f"removing {client}", on_step) as draft:
        state = draft.before
        require_known([client], tuple(state.members), "registry")
        member = state.members[client]
        staying = {name: m for name, m in state.members.items() if name != client}
        after = _with_members(state, staying, keep=keep_versions)
        after = _compose(draft, after, coming=[], going=[member])
        after = _drop_versions(draft, after, client, keep=keep_versions)
        draft.deletions.append(member.folder)
        record = RemovalRecord(
            registry=registry.identity,
            sequence=draft.next_sequence,
            time=journal.utc_now(),
            client=client,
            requested_by=requested_by,
            reason=reason,
            kind=member.kind,
            num_examples=member.num_examples,
            classes=member.classes,
            removed_files=member.files,
            removed_rounded_sha256=member.rounded_sha256,
            added=member.added,
            root_before=state.root,
            root_after=after.root,
            journal_before=state.journal_sha256,
            composition_before=state.files,
            composition_after=after.files,
            survivors=tuple(after.members),
            classes_after=after.classes,
            kept_versions=tuple(n for n, kept in after.kept.items() if client in kept["clients"]),
            recomposed=draft.recomposed,
            influence=foreseen_influence(draft.entries, client, tuple(staying)),
            fedcompo_version=version("fedcompo"),
        ).signed(registry.path / "key.pem")
        name = f"{REMOVALS}/{draft.next_sequence:06d}-{client}.json"
        (draft.new / REMOVALS).mkdir()
        transaction.write_synced(draft.new / name, record.text.encode())
        draft.moves.append(name)
        details = {
            **_essence(member),
            "record": name,
            "record_sha256": file_sha256(draft.new / name),
        }
        _finish(draft, after, [("removed", details)])
        return record


def realign(registry: Registry, mixtures: Mapping[str, Mixtures]) -> None:
    """Fit the joint head again; see :meth:`fedcompo.registry.Registry.realign`."""
    with _drafted(registry, "aligning the joint head again", lambda step: None) as draft:
        state = draft.before
        described = {client: tuple(sorted(own)) for client, own in mixtures.items()}
        members = {client: member.classes for client, member in state.members.items()}
        if described != members:
            wrong = sorted(
                c for c in described.keys() | members if described.get(c) != members.get(c)
            )
            raise ContributionError(
                f"Mixtures of the composed model's features are needed from every member, of its "
                f"own classes; wrong or missing: {', '.join(wrong)}."
            )
        for client, own in mixtures.items():
            for mixture in own.values():
                mixture.check(registry.backbone.num_features, f"client {client!r}")
        after = _compose(draft, _with_members(state, state.members), [], [], mixtures)
        _finish(draft, after, [("realigned", {"clients": sorted(mixtures)})])


def foreseen_influence(
    entries: Sequence[journal.Entry], client: str, survivors: Sequence[str]
) -> Influence:
    """What of a client would be left in the survivors; the journal knows everyone's lineage."""
    everyone = [
        (added["client"], Lineage(**tuples(added["lineage"])))
        for entry in entries
        if entry.event == "added"
        for added in entry.details["clients"]
    ]
    return influence(client, survivors, dict(everyone), former=everyone)


@contextmanager
def _drafted(registry: Registry, purpose: str, on_step: OnStep) -> Iterator[_Draft]:
    """Hold the lock, see the current state, and leave nothing staged if anything goes wrong."""

    def waiting(holder: str) -> None:
        on_step(f"waiting for another writer ({holder})")

    try:
        with transaction.locked(registry.path, purpose, on_wait=waiting):
            try:
                registry.refresh()
                yield _Draft(registry, transaction.stage(registry.path), on_step)
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


def _stage(draft: _Draft, source: Contribution | Path, known: set[str]) -> Member:
    """Copy a contribution to where it will live, check all of it, describe it."""
    registry = draft.registry
    given = source if isinstance(source, Contribution) else Contribution.open(source)
    name = check_client_name(str(given.client))
    draft.on_step(f"checking {name}")
    place = f"{CLIENTS}/{name}"
    if name in draft.before.members:  # readers still need the old one
        place += f"~{draft.next_sequence}"
    if place in draft.moves:
        raise ContributionError(f"Two of the contributions are of {name!r}.")
    folder = draft.new / place
    staged = stage_contribution(source, folder)
    check_contribution(
        staged,
        theta_shapes=registry.backbone.theta_shapes,
        base=registry.state.base,
        num_features=registry.backbone.num_features,
        members=known,
    )
    draft.moves.append(place)
    return Member.of(
        staged,
        folder=place,
        files={path.name: file_sha256(path) for path in sorted(folder.iterdir())},
        statistics_sha256=_statistics_digest(staged),
        added=draft.next_sequence,
    )


def _compose(
    draft: _Draft,
    after: State,
    coming: Sequence[Member],
    going: Sequence[Member],
    realigned: Mapping[str, Mixtures] | None = None,
) -> State:
    """Write the composition of the new members, continuing the sum where that is exact."""
    registry, before = draft.registry, draft.before
    if before.version:
        draft.deletions.append(before.version)
    if not after.members:
        return after
    place = f"{VERSIONS}/{draft.next_sequence:06d}"
    folder = draft.new / place
    folder.mkdir(parents=True)
    draft.on_step("aligning the joint head")
    mixtures = realigned or {c: _statistics(draft, m) for c, m in after.members.items()}
    settings = after.settings
    head = composition.joint_head(
        mixtures, samples=settings.align_samples, ridge=settings.ridge, seed=settings.seed
    )
    if realigned is not None:
        composition.save_realigned(folder / REALIGNED, realigned)
    changes = [(m, 1) for m in coming] + [(m, -1) for m in going]
    recipe = composition.Recipe(
        registry.backbone,
        [_term(draft, member, sign) for member, sign in changes],
        registry.running_sum() if before.version else None,
        after.count,
        settings.scale,
        head,
    )
    draft.on_step("composing")
    try:
        rounded = composition.write_version(folder, recipe)
        digests = {m.client: rounded[index] for index, m in enumerate(coming)}
    except RoundedDifferently as error:
        draft.on_step(f"composing from all members: {error} rounds differently on this machine")
        draft.recomposed = True
        (folder / SUM).unlink()
        (folder / WEIGHTS).unlink()
        everyone = [replace(_term(draft, m, 1), rounded_sha256="") for m in after.members.values()]
        rounded = composition.write_version(folder, replace(recipe, terms=everyone, before=None))
        digests = dict(zip(after.members, rounded, strict=True))
    draft.moves.append(place)
    members = {
        client: replace(member, rounded_sha256=digests.get(client, member.rounded_sha256))
        for client, member in after.members.items()
    }
    files = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    return replace(after, members=members, version=place, files=files)


def _term(draft: _Draft, member: Member, sign: int) -> Term:
    """A member's term of the sum; one that is new is read from where it is staged."""
    if (draft.new / member.folder).exists():
        contribution = Contribution.open(draft.new / member.folder, with_fisher=False)
    else:
        contribution = draft.registry.contribution(member.client)
    times = sign * draft.before.settings.times(member.num_examples)
    return Term(member.client, contribution.task_vector, times, member.rounded_sha256)


def _statistics(draft: _Draft, member: Member) -> Mixtures:
    """A member's mixtures; of its file only they are read, and held against their own digest."""
    staged = draft.new / member.folder
    folder = staged if staged.exists() else draft.registry.path / member.folder
    contribution = Contribution.open(folder, with_fisher=False)
    if _statistics_digest(contribution) != member.statistics_sha256:
        raise RegistryDamaged(
            f"Head and mixtures in {folder} were altered. Restore the registry from a copy."
        )
    return contribution.features


def _statistics_digest(contribution: Contribution) -> str:
    head = contribution.head
    tensors = {"head/weight": head.weight, "head/bias": head.bias}
    return tensor_digest(tensors | mixture_tensors(contribution.features))


def _with_members(state: State, members: Mapping[str, Member], *, keep: bool = False) -> State:
    """The same registry with other members, and no composition yet."""
    ordered = {client: members[client] for client in sorted(members)}
    kept = dict(state.kept)
    if state.version and (keep or state.settings.keep_versions):
        kept[state.version] = {"clients": sorted(state.members), "files": dict(state.files)}
    return replace(state, members=ordered, version="", files={}, kept=kept)


def _drop_versions(draft: _Draft, after: State, client: str, *, keep: bool) -> State:
    """Let earlier compositions that contain a client go with it."""
    if keep:
        return after
    going = [place for place, kept in after.kept.items() if client in kept["clients"]]
    draft.deletions += going
    return replace(after, kept={p: kept for p, kept in after.kept.items() if p not in going})


def _finish(draft: _Draft, after: State, events: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Write the journal's lines and the new state, and commit."""
    outcome: dict[str, Any] = {"root_before": draft.before.root, "root_after": after.root}
    if draft.recomposed:  # the members' rounded forms are those of this machine now
        outcome["rounded"] = {c: m.rounded_sha256 for c, m in after.members.items()}
    *first, (event, details) = events
    entries = journal.follow(draft.entries[-1], [*first, (event, {**details, **outcome})])
    after = replace(after, sequence=entries[-1].sequence, journal_sha256=entries[-1].sha256)
    size = sum(len(entry.line.encode()) + 1 for entry in draft.entries)
    change = transaction.Change(
        moves=tuple(draft.moves),
        journal_size=size,
        journal_lines=tuple(entry.line for entry in entries),
        deletions=tuple(path for path in draft.deletions if path not in after.kept),
        model=after.version,
    )
    draft.on_step("writing")
    transaction.commit(draft.registry.path, change, after.text)


def _essence(member: Member) -> dict[str, Any]:
    """What the journal keeps of a member: names, numbers and digests."""
    values = asdict(member)
    del values["folder"]
    return values
