"""Verifies a removal record: with the registry all its claims, with the key its signature."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fedcompo.composition.head import SHRINKAGE, joint_head
from fedcompo.composition.models import times_of
from fedcompo.composition.settings import MEAN
from fedcompo.composition.totals import save_total, total_after
from fedcompo.composition.version import terms_of, write_composed, write_ruled, write_sum
from fedcompo.config.choices import Statistics
from fedcompo.errors import FedcompoError, FileFormatError
from fedcompo.registry.comebacks import Comebacks
from fedcompo.registry.history import line_of, members_after, outcome_of, root_of
from fedcompo.registry.journal import Entry
from fedcompo.registry.key_verification import signature_finding
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.rederivation import Finding, as_json, compared, expected_factor
from fedcompo.registry.removal import RemovalRecord, foreseen_influence
from fedcompo.registry.removed import VECTOR, content_of
from fedcompo.registry.verification import all_but_folders, strangers
from fedcompo.report.progress import step
from fedcompo.storage.files import CONFIG, OLD_TOTALS, RULED, SUM, TOTALS, WEIGHTS
from fedcompo.storage.identity import HEADER, identity, old_sha256
from fedcompo.storage.tensorstream import file_sha256

READABLE = "the registry can be read"
FACTOR = "factor"
VECTORS = "the rule's singular vectors are this machine's"
BY_MACHINE = {
    RULED: VECTORS,
    FACTOR: VECTORS,
    WEIGHTS: "the joint head is fitted with this machine's arithmetic",
}


def verify_record(
    path: Path, *, registry: RegistryReader | None = None, public_key: Path | None = None
) -> list[Finding]:
    """Check a removal record.

    Args:
        path: The record.
        registry: The registry that wrote it; without it only the signature can be checked.
        public_key: Key to check the signature with; None: the registry's.

    Returns:
        One finding for each claim.

    Raises:
        FileFormatError: If neither a registry nor a key is given.
    """
    if public_key is None and registry is None:
        raise FileFormatError("A record is checked with its registry, or with a public key.")
    entries: Sequence[Entry] = ()
    damage: list[Finding] = []
    try:
        entries = registry.entries() if registry else ()
    except FedcompoError as error:
        damage = [Finding(READABLE, False, str(error))]
    findings = [signature_finding(path, public_key, registry, entries)]
    if not findings[0].holds or registry is None or damage:
        return findings + damage
    record = RemovalRecord.parse(path.read_bytes(), source=str(path))
    try:
        step("journal")
        findings += _against_journal(record, file_sha256(path), registry, entries)
        step("files")
        unknown = strangers(registry, entries)
        findings += [_is_gone(record, registry, unknown), _kept(record, registry)]
        detail = f"what they hold was not read: {', '.join(map(str, unknown))}"
        claim = "no file lies there that the registry does not know"
        findings.append(Finding(claim, None if unknown else True, detail if unknown else ""))
        step("what was removed")
        findings += _nobody_has_it(record, registry, entries, unknown)
        step("composing again from the survivors")
        findings += _composed_again(record, registry, entries)
    except FedcompoError as error:
        findings.append(Finding(READABLE, False, str(error)))
    return findings


def _against_journal(
    record: RemovalRecord, sha256: str, registry: RegistryReader, entries: Sequence[Entry]
) -> Iterator[Finding]:
    """Compare the record with the journal, replayed up to the removal."""
    claim = "the registry is the one of the record"
    yield compared(claim, record.registry, registry.identity)
    claim = f"line {record.sequence} of the journal tells of this record"
    if not 1 < record.sequence <= len(entries):
        yield Finding(claim, False, f"the journal has {len(entries)} lines")
        return
    entry, earlier = entries[record.sequence - 1], entries[: record.sequence - 1]
    line = entry.event, entry.details.get("client"), entry.details.get("record_sha256")
    yield compared(claim, ("removed", record.client, sha256), line)
    yield compared("the journal stood where it says", record.journal_before, earlier[-1].sha256)
    yield from _roots(record, registry, entries)
    members = members_after(earlier)
    added = members.pop(record.client, {})
    claimed = {name: getattr(record, name) for name in ("kind", "num_examples", "classes", "added")}
    claimed |= {"files": record.removed_files, "rounded_sha256": record.removed_rounded_sha256}
    known = {key: added.get(key) for key in claimed}
    yield compared("what was removed is what had been added", as_json(claimed), known)
    claim = "the survivors are those of the journal"
    yield compared(claim, record.survivors, tuple(sorted(members)))
    classes = {name for member in members.values() for name in member["classes"]}
    yield compared("the classes are the survivors'", record.classes_after, tuple(sorted(classes)))
    derived = foreseen_influence(earlier, record.client, tuple(members))
    yield compared("the lineage statement follows from the lineages", record.influence, derived)
    yield compared("the caps are the registry's", record.caps, registry.settings.caps)
    yield compared("the rule is the registry's", record.rule or MEAN, registry.settings.rule)
    claim = "whether the sum was taken anew is as the journal says"
    yield compared(claim, record.recomposed, "rounded" in entry.details)


def _roots(
    record: RemovalRecord, registry: RegistryReader, entries: Sequence[Entry]
) -> Iterator[Finding]:
    """Compare the roots, and the compositions that they cover, with the journal."""
    for moment, last in (("before", record.sequence - 1), ("after", record.sequence)):
        root, files, factor = (
            getattr(record, f"{part}_{moment}") for part in ("root", "composition", "factor")
        )
        members, told = members_after(entries[:last]), outcome_of(entries[:last])
        yield compared(f"the root {moment} is the journal's", root, told.get("root_after"))
        derived = root_of(registry.state, members, files)
        claim = f"the composition {moment} is covered by the journal's root"
        yield compared(claim, derived, told.get("root_after"))
        if factor is not None:
            yield compared(f"the factor {moment} is the journal's", factor, told.get("factor"))


def _is_gone(record: RemovalRecord, registry: RegistryReader, unknown: Sequence[Path]) -> Finding:
    """Check that no file is one of those removed, and no other file the model that held them."""
    claim = f"no file of {record.client} is in the registry"
    digests = set(record.removed_files.values())
    composed = record.composition_before.items() - record.composition_after.items()
    models = {digest for name, digest in composed if name != CONFIG}
    files = (path for path in all_but_folders(registry.path) if path.is_file())
    left = [p for p in files if identity(p) in (digests | models if p in unknown else digests)]
    again = registry.state.members.get(record.client)
    if again is not None and again.added > record.sequence:
        home = registry.path / again.folder
        if left and all(home in path.parents for path in left):
            return Finding(claim, None, f"it came back, with line {again.added} of the journal")
    return Finding.of(claim, not left, f"still there: {', '.join(map(str, left))}")


def _nobody_has_it(
    record: RemovalRecord,
    registry: RegistryReader,
    entries: Sequence[Entry],
    unknown: Sequence[Path],
) -> Iterator[Finding]:
    """Check that task vector and statistics are nobody's, now and at every line since."""
    line = entries[record.sequence - 1 : record.sequence]
    told = content_of(line[0].details) if line and "rounded_sha256" in line[0].details else {}
    content = record.removed_content or {**told, VECTOR: record.removed_rounded_sha256}
    yield compared("the digests of what was removed are the journal's", content, told)
    since = record.sequence
    comebacks = Comebacks(registry, entries, derived_since=since, strangers=unknown)
    yield from comebacks.findings(record.client, since, content, unasked=False)


def _kept(record: RemovalRecord, registry: RegistryReader) -> Finding:
    """Check that earlier compositions with the client are only those that the record names."""
    claim = f"of compositions that contain {record.client}, only those named are kept"
    left = [
        folder
        for folder, kept in registry.state.kept.items()
        if record.client in kept["clients"]
        and line_of(folder) < record.sequence
        and folder not in record.kept_versions
    ]
    return Finding.of(claim, not left, f"still there: {', '.join(left)}")


def _composed_again(
    record: RemovalRecord, registry: RegistryReader, entries: Sequence[Entry]
) -> Iterator[Finding]:
    """Compose the survivors from scratch, in a folder of its own, and compare the digests."""
    old, first = OLD_TOTALS in record.composition_after, record.format_version == 1
    rule = registry.settings.made_by
    files = [SUM, *([] if old or first else [TOTALS]), *([] if rule.is_sum else [RULED]), WEIGHTS]
    names = [*files, *([] if first else [FACTOR])]
    claims = {name: f"the survivors alone give the record's {name}" for name in names}
    if old:
        claim = f"the survivors alone give the record's {OLD_TOTALS}"
        yield Finding(claim, None, "it holds sums of Fisher diagonals, which are no longer made")
    then = members_after(entries[: record.sequence])
    now = {client: member.files for client, member in registry.state.members.items()}
    gone = [c for c in record.survivors if c not in now or now[c] != then.get(c, {}).get("files")]
    if gone:
        detail = f"left or replaced since: {', '.join(gone)}"
        yield from (Finding(claim, None, detail) for claim in claims.values())
        return
    if not record.survivors:
        yield compared("nothing is composed of nobody", dict(record.composition_after), {})
        return
    with tempfile.TemporaryDirectory(prefix="fedcompo-verify-") as folder:
        line = entries[record.sequence - 1 : record.sequence]  # empty if a lie names a later one
        shrinkage = line[0].details.get("shrinkage") if line else SHRINKAGE
        factor = _compose_survivors(Path(folder), record, registry, shrinkage)
        stated = {FACTOR: record.factor_after, **record.composition_after}
        here: dict[str, object] = {FACTOR: factor}
        for name in files:  # an earlier version wrote its files, and knew them, otherwise
            is_old = not str(stated.get(name, HEADER)).startswith(HEADER)
            here[name] = (old_sha256 if is_old else identity)(Path(folder) / name)
    by_machine = {WEIGHTS} if rule.portable else {RULED, WEIGHTS}
    for name in names:  # sums are exact; what differs after them may be this machine's rounding
        detail = f"here it is {here[name]}"
        if here[name] == stated.get(name):
            yield Finding(claims[name], True)
        elif name in by_machine:
            by_machine |= {FACTOR} if name == RULED else set()  # it follows from this one's length
            yield Finding(claims[name], None, f"{detail}: {BY_MACHINE[name]}")
        else:
            by_machine.clear()
            yield Finding(claims[name], False, detail)


def _compose_survivors(
    folder: Path, record: RemovalRecord, registry: RegistryReader, shrinkage: float | None
) -> float:
    """Compose the survivors as the removal did; return the factor."""
    backbone, settings = registry.backbone, registry.settings
    pool = registry.pool().only(*record.survivors)
    state = replace(
        registry.state,
        members={client: registry.state.members[client] for client in record.survivors},
        factor=record.factor_before or 0.0,
        factor_by=record.factor_by,
        shrinkage=shrinkage,
    )
    terms = terms_of(pool, settings)
    _, squared = write_sum(folder / SUM, backbone, terms, count=state.count)
    members, times = pool.contributions, times_of(pool, settings)
    if not settings.made_by.is_sum:
        squared = write_ruled(folder, backbone, settings, members, times)
    state = replace(state, factor=expected_factor(state, squared))
    if settings.statistics is Statistics.SUMS:
        save_total(folder / TOTALS, total_after(None, pool, (), settings))
    write_composed(
        folder,
        backbone,
        joint_head({own.client: own.statistics for own in pool}, settings, shrinkage=shrinkage),
        factor=state.factor,
        linearised=pool.linearised,
        about=state.about,
    )
    return state.factor
