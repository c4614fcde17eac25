"""Changes a registry: adds and removes contributions, and composes what results.

Every change is one transaction: stage, check, compose, commit. Its cost grows with the
contributions that are added or removed, not with those that stay.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedcompo.composition.claims import capped
from fedcompo.composition.settings import MEAN
from fedcompo.data.tasks import shard_of, whole_of
from fedcompo.errors import ConfigError, ContributionError, blaming
from fedcompo.method.contribution import AnyStatistics, Contribution, counts_of
from fedcompo.method.pool import require_unmixed
from fedcompo.method.statistics import FeatureSums
from fedcompo.registry import journal
from fedcompo.registry.admission import check_change, check_features, check_kind, outliers
from fedcompo.registry.company import Company, Known
from fedcompo.registry.draft import Draft, Realignment, drafted, opened
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.removal import RemovalRecord, foreseen_influence
from fedcompo.registry.removed import Removed, content_of, numbers_of
from fedcompo.registry.signing import require_own, signer_for
from fedcompo.registry.state import Member, State
from fedcompo.runtime import version
from fedcompo.storage.files import canonical, write_synced
from fedcompo.storage.tensorstream import file_sha256

FEW = 100
"""Most classes of a member that the journal lists when it leaves."""


def add(
    registry: RegistryReader,
    sources: Sequence[Contribution | Path],
    *,
    replacing: bool,
    empty: bool = False,
    requested_by: str = "",
) -> None:
    """Add contributions, all or none; see :meth:`fedcompo.registry.registry.Registry.add`."""
    if not sources:
        raise ContributionError("There is nothing to add; name at least one contribution.")
    with drafted(registry, f"adding {len(sources)} contribution(s)") as draft:
        state = draft.before
        names = [str(own.client) for own in map(opened, sources)]
        gone = [state.members[client] for client in names if client in state.members]
        if gone and not replacing:
            raise ContributionError(
                f"Client {gone[0].client!r} is in the registry {registry.path} already. "
                "Replace it explicitly (`--replace`, `replace = true`), which is a removal and "
                "an addition, or give the newcomer another name."
            )
        left = [{**_left(draft, member), "within": "replacement"} for member in gone]
        company = replace(Company.of(registry), removed=Removed(registry, left))
        coming: dict[str, Member] = {}
        for source in sources:
            member = draft.stage(source, company)
            if numbers_of(draft.opened(member)):  # what earlier versions removed has this digest
                with blaming(member.client):
                    digest = member.statistics_sha256
                    company.removed.refuse(member.client, "statistics", digest)
            line = draft.next_sequence + len(gone)  # each of them has a line of its own before
            coming[member.client] = replace(member, added=line)
            company = company.joined({member.client: Known(member.classes)})
        staying = {name: member for name, member in state.members.items() if name not in names}
        _check_dealing(draft, {**staying, **coming}, {whole_of(client) for client in coming})
        after = _with_members(state, {**state.members, **coming})
        require_unmixed({client: member.kind for client, member in after.members.items()})
        counts = (counts_of(draft.opened(member).statistics) for member in coming.values())
        after = replace(after, settings=after.settings.with_caps(counts))  # the first choose caps
        after = draft.compose(after, coming=list(coming.values()), going=gone)
        for client, member in coming.items():
            norm, digest = math.sqrt(draft.norms[client]), after.members[client].rounded_sha256
            own = Known(member.classes, norm, digest)
            with blaming(client):
                check_change(client, own, company, empty=empty)
            company = company.joined({client: own})
        for client, reason in outliers(coming, company).items():
            with blaming(client):
                raise ContributionError(reason)
        events = [("removed", details) for details in left]
        newcomers = [_journalled(after.members[client]) for client in sorted(coming)]
        events.append(("added", {"clients": newcomers, **_requester(requested_by)}))
        draft.deletions += [member.folder for member in gone]
        draft.finish(after, events)


def remove(
    registry: RegistryReader,
    client: str,
    *,
    requested_by: str,
    reason: str,
    keep_versions: bool,
    key: Path | None = None,
) -> RemovalRecord:
    """Remove a client; see :meth:`fedcompo.registry.registry.Registry.remove`."""
    signer = signer_for(registry.path, key)
    with drafted(registry, f"removing {client}") as draft:
        require_own(signer, registry.path)  # it may have been changed while we waited
        state, member = draft.before, registry.member(client)
        staying = {name: m for name, m in state.members.items() if name != client}
        after = _with_members(state, staying, keep=keep_versions)
        after = draft.compose(after, coming=[], going=[member])
        after = _drop_versions(draft, after, client, keep=keep_versions)
        draft.deletions.append(member.folder)
        left = _left(draft, member)
        record = _record(draft, member, after, requested_by=requested_by, reason=reason)
        record = replace(record, removed_content=content_of(left)).signed(signer)
        path = draft.new / record.place
        path.parent.mkdir()
        write_synced(path, record.text.encode())
        draft.moves.append(record.place)
        details = {
            **left,
            "record": record.place,
            "record_sha256": file_sha256(path),
            **_requester(requested_by),
        }
        draft.finish(after, [("removed", details)])
        return record


def _record(
    draft: Draft, member: Member, after: State, *, requested_by: str, reason: str
) -> RemovalRecord:
    """Describe a removal in a record."""
    registry, before, client = draft.registry, draft.before, member.client
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
        root_before=before.root,
        root_after=after.root,
        journal_before=before.journal_sha256,
        composition_before=before.files,
        composition_after=after.files,
        survivors=tuple(after.members),
        classes_after=after.classes,
        kept_versions=tuple(n for n, kept in after.kept.items() if client in kept["clients"]),
        recomposed=False,
        influence=foreseen_influence(draft.entries, client, tuple(after.members)),
        fedcompo_version=version("fedcompo"),
        caps=after.settings.caps,
        rule=after.settings.rule if after.settings.rule != MEAN else "",
    )
    if before.chosen:  # else the format fixes the factor
        now, by = after.factor, str(after.factor_by)
        record = replace(record, factor_before=before.factor, factor_after=now, factor_by=by)
    return record


def realign(
    registry: RegistryReader,
    statistics: Mapping[str, AnyStatistics] | FeatureSums,
    factor: float | None,
) -> None:
    """Make the joint head again; see :meth:`fedcompo.registry.registry.Registry.realign`."""
    with drafted(registry, "aligning the joint head again") as draft:
        state, num_features = draft.before, registry.backbone.num_features
        if isinstance(statistics, FeatureSums):
            check_kind(statistics, state.settings.statistics, "the sum of all members")
            owner, clients = "all members", len(state.members)
            statistics.check(state.classes, num_features, owner, clients=clients)
        else:
            _check_described(state, statistics, num_features)
            cap = state.settings.class_cap
            statistics = {client: capped(own, cap) for client, own in statistics.items()}
        if factor is not None and (given := state.settings.factor_given):
            raise ConfigError(
                f"The registry composes {given}, so no factor can be chosen. Make a new registry "
                "with `scale = auto`, and a rule that leaves λ open."
            )
        if factor is not None and not 0 <= factor < math.inf:
            raise ConfigError(f"A factor must be a number >= 0, got {factor}.")
        new = Realignment(statistics, factor)
        after = draft.compose(_with_members(state, state.members), [], [], new)
        draft.finish(after, [("realigned", {"clients": sorted(state.members)})])


def _check_described(
    state: State, statistics: Mapping[str, AnyStatistics], num_features: int
) -> None:
    """Refuse statistics of other members or classes, or of another kind."""
    described = {client: tuple(sorted(counts_of(own))) for client, own in statistics.items()}
    members = {client: member.classes for client, member in state.members.items()}
    if described != members:
        wrong = sorted(c for c in described.keys() | members if described.get(c) != members.get(c))
        raise ContributionError(
            f"Statistics of the composed model's features are needed from every member, of its "
            f"own classes; wrong or missing: {', '.join(wrong)}."
        )
    for client, own in statistics.items():
        kind, owner = state.settings.statistics, f"client {client!r}"
        check_features(own, members[client], num_features, kind, owner)


def _with_members(state: State, members: Mapping[str, Member], *, keep: bool = False) -> State:
    """Return the state with other members, and with no composition yet."""
    ordered = {client: members[client] for client in sorted(members)}
    kept = dict(state.kept)
    if state.version and (keep or state.settings.keep_versions):
        kept[state.version] = {"clients": sorted(state.members), "files": dict(state.files)}
    return replace(state, members=ordered, version="", files={}, kept=kept)


def _drop_versions(draft: Draft, after: State, client: str, *, keep: bool) -> State:
    """Mark earlier compositions that contain a client for deletion, unless they are kept."""
    if keep:
        return after
    going = [place for place, kept in after.kept.items() if client in kept["clients"]]
    draft.deletions += going
    return replace(after, kept={p: kept for p, kept in after.kept.items() if p not in going})


def _check_dealing(draft: Draft, members: Mapping[str, Member], clients: Collection[str]) -> None:
    """Refuse shards of a client that differ in their number of shards: images would count twice."""
    dealt: dict[str, dict[object, str]] = {}
    for name, member in members.items():
        if shard_of(name) is not None and (whole := whole_of(name)) in clients:
            number = draft.opened(member).settings.get("shards")
            dealt.setdefault(whole, {}).setdefault(number, name)
    for whole, numbers in dealt.items():
        if len(numbers) > 1:
            (one, first), (other, second), *_ = numbers.items()
            raise ContributionError(
                f"{second!r} is one of {other} shards, {first!r} one of {one}: images would count "
                f"twice. Train with the same `shards`, or remove {whole!r} first."
            )


def _requester(requested_by: str) -> dict[str, str]:
    """Return who asked for a change, for the journal; empty if that is not known."""
    return {"requested_by": requested_by} if requested_by else {}


def _journalled(member: Member) -> dict[str, Any]:
    """Return a member as the journal keeps it: names, numbers and digests."""
    values = member.values
    del values["folder"]
    return values


def _left(draft: Draft, member: Member) -> dict[str, Any]:
    """Return the same of a member that leaves; its line of arrival lists its classes already."""
    values, names = _journalled(member), list(member.classes)
    if len(names) > FEW:
        digest = hashlib.sha256(canonical(names).encode()).hexdigest()
        values["classes"] = {"count": len(names), "sha256": digest}
    return {**values, "numbers_sha256": numbers_of(draft.opened(member))}
