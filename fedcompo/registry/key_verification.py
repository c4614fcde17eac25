"""Verifies a registry's keys, whose they are, and that its journal continues one seen before."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedcompo.errors import ConfigError, FedcompoError
from fedcompo.registry import known, signing
from fedcompo.registry.checkpoint import Checkpoint
from fedcompo.registry.journal import Entry
from fedcompo.registry.reader import RegistryReader
from fedcompo.registry.rederivation import Finding, compared
from fedcompo.registry.removal import RemovalRecord
from fedcompo.registry.rotation import EVENT, key_at, keys_of, rotations_in
from fedcompo.registry.signing import fingerprint_of
from fedcompo.registry.state import PRIVATE, PUBLIC

FINGERPRINT = re.compile(r"[0-9a-f]{64}")
SINCE = re.compile(r"([0-9a-f]{64})@([0-9]{1,18})")
COMPARE = (
    "it is neither pinned on this machine nor given. Ask the registry's operator for its "
    "fingerprint by another way, compare, and give it: --public-key "
)


def check_keys(registry: RegistryReader, entries: Sequence[Entry]) -> Iterator[Finding]:
    """Check that the keys belong together, and that others cannot read the private one."""
    claim = "each change of the key is signed by the key before, and leads to the present one"
    try:
        keys_of(registry, entries)
        if rotations_in(entries, registry.identity):
            yield Finding(claim, True)
    except (FedcompoError, OSError) as error:
        yield Finding(claim, False, str(error))
    private = registry.path / PRIVATE
    if not private.exists():  # it may lie outside, or this is a copy
        return
    claim = "the keys belong together"
    try:
        if signing.is_locked(private):
            detail = f"{private} is encrypted; set {signing.PASSWORD} to check it"
            yield Finding(claim, None, detail)
        else:
            signing.check_pair(private, registry.path / PUBLIC)
            yield Finding(claim, True)
    except PermissionError as error:  # as it should be: somebody else verifies
        yield Finding(claim, None, str(error))
    except (FedcompoError, OSError) as error:
        yield Finding(claim, False, str(error))
    mode = private.stat().st_mode & 0o777
    advice = (
        f"it has mode {mode:04o}, so others on this machine may sign in the registry's name. Run "
        f"`chmod 600 {private}`, and `fedcompo rotate-key` if somebody may have read it"
    )
    yield Finding.of(f"{PRIVATE} is readable by its owner alone", not mode & 0o077, advice)


def expected_fixed(entries: Sequence[Entry]) -> dict[str, Any]:
    """SHA-256 of the files that nothing but a change of the key alters, by the journal."""
    fixed = dict(entries[0].details.get("fixed", {}))
    for entry in entries:
        fixed |= entry.details.get("fixed", {}) if entry.event == EVENT else {}
    return fixed


def signature_finding(
    path: Path,
    public: Path | None,
    registry: RegistryReader | None = None,
    entries: Sequence[Entry] = (),
) -> Finding:
    """Whether a record is whole and signed.

    Args:
        path: The record.
        public: Key to check it with; None: the key that the registry had at the record's line.
        registry: The registry; only needed without a key.
        entries: Its journal, which tells when its key changed.
    """
    claim = f"{path.name} is signed by the registry's key"
    try:
        record = RemovalRecord.parse(path.read_bytes(), source=str(path))
        if public is None and registry is not None:
            key = key_at(registry, entries, record.sequence)
            source = f"{registry.path / PUBLIC}, SHA-256 {fingerprint_of(key)}"
        else:
            key, source = Path(public or PUBLIC).read_bytes(), str(public)
        signed = signing.is_signed(record.signed_bytes, record.signature, key)
    except (FedcompoError, OSError) as error:
        return Finding(claim, False, f"with {public}: {error}" if public else str(error))
    return Finding.of(claim, signed, f"the signature is not that of {source}")


def given_fingerprint(public_key: str) -> str:
    """Fingerprint of a key that is given as such, or as a PEM file.

    Raises:
        ConfigError: If it is neither.
        FileFormatError: If the file holds no key.
    """
    if FINGERPRINT.fullmatch(plain := public_key.lower().replace(":", "")):
        return plain
    if not Path(public_key).is_file():
        raise ConfigError(
            f"`--public-key {public_key}` is neither a PEM file nor a fingerprint, 64 "
            "hexadecimal digits."
        )
    return fingerprint_of(Path(public_key).read_bytes())


def whose_key(
    registry: RegistryReader | None, record: Path | None, public: Path, given: str
) -> Finding:
    """Whether the key that signs is one that this machine knows, or that was given.

    Args:
        registry: The registry at hand; None: only a record and a key are.
        record: The record; None: the registry itself is verified.
        public: File of the public key; of the registry's, if it is at hand.
        given: Fingerprint of the key that was given; empty: none, so the key must be pinned.
    """
    claim = f"signed by the key in {public}, SHA-256 {{}}, {{}}"
    try:
        told = RemovalRecord.parse(record.read_bytes(), source=str(record)) if record else None
        if registry is None:
            linked, key = set[str](), fingerprint_of(public.read_bytes())
        else:
            entries = registry.entries()
            linked = {fingerprint_of(pem) for _, pem in keys_of(registry, entries)}
            line = told.sequence if told else len(entries) + 1
            key = fingerprint_of(key_at(registry, entries, line))
    except (FedcompoError, OSError) as error:
        return Finding(claim.format("?", "which this machine knows"), False, str(error))
    identity = registry.identity if registry else told.registry if told else ""
    if given:
        detail = f"the one that was given has SHA-256 {given}"
        stated = claim.format(key, "which was given by --public-key")
        return Finding.of(stated, given in {*linked, key}, detail)
    held = known.known(identity)
    if held and (held.fingerprint in linked or held.signs(key, told.sequence if told else 0)):
        return Finding(claim.format(key, f"pinned on this machine since {held.since}"), True)
    detail = f"{known.place()} has {held.fingerprint} for this registry; " if held else ""
    unknown = claim.format(key, "which this machine knows")
    return Finding(unknown, False, f"{detail}{COMPARE}{key}")


def continues(registry: RegistryReader, since: str) -> Iterator[Finding]:
    """Check that a registry's journal has a line and root seen before, and goes on from there.

    Args:
        registry: The registry.
        since: ``ROOT@N``, or the file of a checkpoint.

    Raises:
        ConfigError: If it is neither.
        FileFormatError: If the file holds no checkpoint.
    """
    entries = registry.entries()
    if match := SINCE.fullmatch(since):
        root, line = match[1], int(match[2])
    elif not Path(since).is_file():
        raise ConfigError(f"`--since {since}` is neither ROOT@N nor the file of a checkpoint.")
    else:
        stated, envelope = Checkpoint.parse(Path(since).read_bytes(), source=since)
        root, line = stated.root, stated.sequence
        yield compared(f"{since} is of this registry", stated.registry, registry.identity)
        signed = envelope.is_signed_by(key_at(registry, entries, line + 1))
        claim = f"{since} is signed by the registry's key of that time"
        yield Finding.of(claim, signed, f"its keyid is {envelope.keyid}")
        claim = f"line {line} of the journal is the one of {since}"
        there = [entry.sha256 for entry in entries[line - 1 : line]]
        yield compared(claim, [stated.journal_sha256], there)
    claim = f"the journal has the root {root} at line {line}, and goes on from there"
    if not 0 < line <= len(entries):
        detail = f"it has {len(entries)} lines: it was set back, or is another's"
        yield Finding(claim, False, detail)
        return
    yield compared(claim, root, _root_at(registry, entries, line))


def _root_at(registry: RegistryReader, entries: Sequence[Entry], line: int) -> str:
    """Return the root after a line of the journal; of a change with several, that after all."""
    if after := entries[line - 1].details.get("root_after"):
        return str(after)
    later = (e.details["root_before"] for e in entries[line:] if "root_before" in e.details)
    return str(next(later, registry.state.root))
