"""Derives all claims of a registry again: files, journal, records, composition.

Nothing is taken on trust but the arithmetic: files are hashed again, the journal's chain is
followed, the running sum and the composed weights are computed anew from the contributions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedcompo.config.choices import Statistics
from fedcompo.errors import FedcompoError, FileFormatError
from fedcompo.registry import journal
from fedcompo.registry.comebacks import Comebacks
from fedcompo.registry.history import end_of_change, line_of, members_after, outcome_of, root_of
from fedcompo.registry.journal import Entry
from fedcompo.registry.key_verification import check_keys, expected_fixed, signature_finding
from fedcompo.registry.owners import OWNERS
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.rederivation import (
    Finding,
    aligned_again,
    as_json,
    compared,
    recomposed,
    totals_again,
)
from fedcompo.registry.releases import RELEASED, members_named
from fedcompo.registry.removed import content_of
from fedcompo.registry.state import PRIVATE, State
from fedcompo.registry.transaction import JOURNAL, LOCK, MODEL, PENDING, STATE
from fedcompo.report.progress import step
from fedcompo.storage.identity import identity

NOTHING_BACK = "nothing that was removed came back under another name"


def verify_registry(path: Path) -> list[Finding]:
    """Check the registry in a folder as a whole.

    Returns:
        One finding for each claim; the registry is intact if all hold.
    """
    try:
        step("state and journal")
        registry = RegistryReader(path)
        entries = _whole_journal(registry)
    except FedcompoError as error:
        return [Finding("state and journal can be read and belong together", False, str(error))]
    findings = [Finding("state and journal can be read and belong together", True)]
    step("files")
    findings += _check_history(registry.state, entries)
    findings += check_keys(registry, entries)
    findings += _check_files(registry)
    findings += _check_records(registry, entries)
    findings += _check_strangers(registry, entries)
    if any(finding.holds is False for finding in findings):
        return findings
    checks: dict[str, Callable[[RegistryReader], Finding]] = {}
    checks[NOTHING_BACK] = partial(_nothing_back, entries=entries)
    if registry.clients:
        step("composing again from all members")
        checks["the composition is that of the members"] = recomposed
        checks["the joint head is that of the members"] = aligned_again
        if registry.settings.statistics is Statistics.SUMS:
            checks["the totals are those of the members"] = totals_again
    for claim, check in checks.items():
        try:
            findings.append(check(registry))
        except FedcompoError as error:
            findings.append(Finding(claim, False, str(error)))
    return findings


def _whole_journal(registry: RegistryReader) -> list[Entry]:
    registry.entries()
    entries = journal.read(registry.path / JOURNAL)
    if len(entries) != registry.state.sequence:
        raise FileFormatError(
            f"{registry.path / JOURNAL} has {len(entries)} lines, {STATE} knows of "
            f"{registry.state.sequence}."
        )
    return entries


def _check_history(state: State, entries: list[Entry]) -> Iterator[Finding]:
    """Replay the journal and compare the result with the state."""
    members = {c: {**m.essence, "added": m.added} for c, m in state.members.items()}
    claim = "the members are those of the journal"
    yield compared(claim, as_json(members), members_after(entries))
    if last := outcome_of(entries):
        claim = "the root is that of the journal's last line"
        yield compared(claim, state.root, last["root_after"])
        chosen = {name: last.get(name) for name in state.chosen}
        yield compared("the factor is that of the journal's last line", state.chosen, chosen)
    claim = "the fixed files are those of the journal's first line"
    yield compared(claim, dict(state.fixed), expected_fixed(entries))
    for line in (entry for entry in entries if entry.event == RELEASED):
        claim = f"line {line.sequence} names the members of the version that was released"
        yield compared(claim, line.details["clients"], members_named(entries[: line.sequence - 1]))
    for folder, kept in state.kept.items():
        yield _kept_finding(folder, kept, state, entries)


def _kept_finding(
    folder: str, kept: Mapping[str, Any], state: State, entries: Sequence[Entry]
) -> Finding:
    """Compare a kept composition with the journal's line that it is named after."""
    claim = f"the kept {folder} is what the journal tells of it"
    last = end_of_change(entries, line_of(folder))
    if last is None:
        return Finding(claim, False, f"{JOURNAL} has no such line")
    members = members_after(entries[: last.sequence])
    kept_root = sorted(kept["clients"]), root_of(state, members, kept["files"])
    return compared(claim, kept_root, (sorted(members), last.details["root_after"]))


def _check_files(registry: RegistryReader) -> Iterator[Finding]:
    """Compare every file that the state names with its SHA-256."""
    state, root = registry.state, registry.path
    groups = [("the ", "", "", state.fixed)]
    groups += [("", f" of {c}", member.folder, member.files) for c, member in state.members.items()]
    groups += [("the composition's ", "", state.version, state.files)]
    groups += [("", f" of the kept {f}", f, kept["files"]) for f, kept in state.kept.items()]
    for before, after, folder, files in groups:
        for file, digest in files.items():
            claim = f"{before}{file}{after} is unaltered"
            yield _file_finding(claim, root / folder / file, digest)


def _check_records(registry: RegistryReader, entries: list[Entry]) -> Iterator[Finding]:
    """Check that every removal in the journal has its record, unaltered and signed."""
    for entry in entries:
        if "record" in entry.details:
            path = registry.path / entry.details["record"]
            claim = f"{entry.details['record']} is unaltered"
            finding = _file_finding(claim, path, entry.details["record_sha256"])
            yield finding
            if finding.holds:
                yield signature_finding(path, None, registry, entries)


def _check_strangers(registry: RegistryReader, entries: list[Entry]) -> Iterator[Finding]:
    """Find files that the state does not name; check where the link ``model`` leads."""
    claim, link = "there is no file that the registry does not know", registry.path / MODEL
    unknown = [str(path.relative_to(registry.path)) for path in strangers(registry, entries)]
    yield Finding(claim, not unknown, ", ".join(unknown))
    target = str(link.readlink()) if link.is_symlink() else ""
    yield compared("the link `model` leads to the composition", target, registry.state.version)


def strangers(registry: RegistryReader, entries: Iterable[Entry]) -> list[Path]:
    """List the files in a registry's folder that it does not know."""
    state, root = registry.state, registry.path
    known = {root / name for name in (STATE, JOURNAL, LOCK, PRIVATE, OWNERS, *state.places)}
    known |= {root / e.details["record"] for e in entries if "record" in e.details}
    known |= {root / MODEL} if (root / MODEL).is_symlink() else set()
    return [
        path
        for path in all_but_folders(root)
        if path not in known and PENDING not in path.relative_to(root).parts[:1]
    ]


def _nothing_back(registry: RegistryReader, entries: Sequence[Entry]) -> Finding:
    """Check that no task vector and no statistics of a removal came back as another client's."""
    comebacks, back = Comebacks(registry, entries), list[str]()
    for entry in entries:
        if entry.event == "removed":
            client, content = entry.details["client"], content_of(entry.details)
            found = comebacks.findings(client, entry.sequence, content)
            back += [f"of {client}, {f.detail}" for f in found if f.holds is False]
    return Finding.of(NOTHING_BACK, not back, "; ".join(back))


def _file_finding(claim: str, path: Path, digest: str) -> Finding:
    try:
        actual = identity(path, checked=True)
    except OSError as error:
        return Finding(claim, False, f"{path} cannot be read: {error.strerror}")
    except FileFormatError as error:
        return Finding(claim, False, str(error))
    return Finding.of(claim, actual == digest, f"{path} has SHA-256 {actual}, expected {digest}")


def all_but_folders(root: Path) -> Iterator[Path]:
    """Files, links and whatever else lies in a folder or below, but for what vanishes meanwhile."""
    found = (Path(place) / n for place, folders, files in os.walk(root) for n in folders + files)
    return (path for path in sorted(found) if path.is_symlink() or not path.is_dir())
