"""The registry gets another key: a statement signed by the old key, and by the new one.

It stands in the journal. So receipts signed before are checked with the key of their time, and who
knows one key of the registry can follow it to the next. That both keys sign keeps a stranger's key
out of the history, at either end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedcompo.errors import ConfigError, FileFormatError, RegistryDamaged
from fedcompo.registry import known
from fedcompo.registry.envelope import opened, sealed, statement_of
from fedcompo.registry.journal import Entry, utc_now
from fedcompo.registry.signing import (
    PRIVATE,
    PUBLIC,
    Signer,
    fingerprint_of,
    place_of_key,
    read_or_create,
    require_own,
    signer_for,
)
from fedcompo.storage.files import canonical, write_synced
from fedcompo.storage.tensorstream import file_sha256

if TYPE_CHECKING:
    from fedcompo.registry.reader import RegistryReader

EVENT = "rotated"
PREDICATE = "https://fedcompo.org/key-rotation/v1"


@dataclass(frozen=True)
class Rotation:
    """A signed statement that a registry's key was exchanged."""

    registry: str
    """Identity of the registry."""
    sequence: int
    """Number of the journal's line that tells of it: the new key signs what comes after."""
    before: bytes
    """The old public key, PEM."""
    after: bytes
    """The new one."""
    data: bytes
    """The envelope."""

    @classmethod
    def parse(cls, data: bytes, *, source: str) -> Rotation:
        """Read an envelope and check both signatures.

        Raises:
            FileFormatError: If it is no such statement, or one of the keys did not sign it.
        """
        envelope = opened(data, source=source)
        try:
            told = envelope.statement["predicate"]
            before, after = told["key_before"].encode(), told["key_after"].encode()
            rotation = cls(told["registry"], told["sequence"], before, after, data)
            intact = envelope.statement == _statement(rotation, told["time"])
        except (KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(f"{source} does not tell of another key.") from error
        if not (intact and all(envelope.is_signed_by(key) for key in (before, after))):
            raise FileFormatError(f"{source} is not signed by both keys that it names.")
        return rotation

    @classmethod
    def make(cls, registry: str, sequence: int, old: Signer, new: Signer) -> Rotation:
        """State, with both keys, that the new one signs from the journal's next line on."""
        bare = cls(registry, sequence, old.public_pem, new.public_pem, b"")
        return replace(bare, data=sealed(_statement(bare, utc_now()), old, new))


def _statement(rotation: Rotation, time: str) -> dict[str, object]:
    subject = {PUBLIC: fingerprint_of(rotation.after)}
    told = {
        "registry": rotation.registry,
        "sequence": rotation.sequence,
        "key_before": rotation.before.decode(),
        "key_after": rotation.after.decode(),
        "time": time,
    }
    return statement_of(PREDICATE, subject, told)


def rotations_in(entries: Sequence[Entry], identity: str) -> list[Rotation]:
    """Read the rotations of a journal, each signed by both of its keys.

    Raises:
        RegistryDamaged: If a line does not hold one, or it is not about this registry and line.
    """
    found: list[Rotation] = []
    for entry in entries:
        if entry.event == EVENT:
            line = f"The rotation in line {entry.sequence} of the journal"
            data = f"{canonical(entry.details.get('envelope'))}\n".encode()
            try:
                rotation = Rotation.parse(data, source=line)
            except FileFormatError as error:
                raise RegistryDamaged(f"{error} Restore the registry from a copy.") from error
            if (rotation.registry, rotation.sequence) != (identity, entry.sequence):
                raise RegistryDamaged(f"{line} is of another registry, or another line.")
            if found and found[-1].after != rotation.before:
                raise RegistryDamaged(f"{line} does not begin with the key before it.")
            found.append(rotation)
    return found


def keys_of(registry: RegistryReader, entries: Sequence[Entry]) -> list[tuple[int, bytes]]:
    """All public keys that a registry had, oldest first, each with the line it signed from.

    Raises:
        RegistryDamaged: If the journal's rotations do not lead to the key that is there.
    """
    current = (registry.path / PUBLIC).read_bytes()
    rotations = rotations_in(entries, registry.identity)
    if rotations and rotations[-1].after != current:
        raise RegistryDamaged(
            f"{registry.path / PUBLIC} is not the key that the journal's rotations lead to: it has "
            f"the fingerprint {fingerprint_of(current)}, expected "
            f"{fingerprint_of(rotations[-1].after)}."
        )
    first = rotations[0].before if rotations else current
    if rotations and hashlib.sha256(first).hexdigest() != entries[0].details["fixed"][PUBLIC]:
        raise RegistryDamaged("The first change of the key does not begin with the first key.")
    return [(0, first), *((rotation.sequence, rotation.after) for rotation in rotations)]


def key_at(registry: RegistryReader, entries: Sequence[Entry], sequence: int) -> bytes:
    """Return the public key, PEM, that signed when the journal got a line; see :func:`keys_of`."""
    return [key for since, key in keys_of(registry, entries) if since < max(sequence, 1)][-1]


def rotate(
    registry: RegistryReader, *, key: Path | None = None, new_key: Path | None = None
) -> Rotation:
    """Give a registry another key, and delete the old private one.

    Args:
        registry: The registry.
        key: File of its private key; None: where
            :func:`~fedcompo.registry.signing.place_of_key` finds it.
        new_key: File of the new private key, which is made if it is not there; None: in the
            registry, if the old one is there. A new key is encrypted as the old one was.

    Raises:
        ConfigError: If the old key is not there, or it is not said where the new one shall lie.
        RegistryLocked: If another process keeps changing the registry.
    """
    from fedcompo.registry.draft import drafted  # takes a second to import, as PyTorch does

    home, old_place = registry.path / PRIVATE, place_of_key(registry.path, key)
    inside = old_place.exists() and home.exists() and old_place.samefile(home)
    if new_key is not None and new_key.absolute() == home.absolute():
        new_key = None
    elif new_key is None and not inside:
        raise ConfigError(
            f"The private key {old_place} lies outside of the registry. Name the file of the new "
            "one by `--new-key FILE`."
        )
    old = signer_for(registry.path, key)
    with drafted(registry, "changing the key") as draft:
        require_own(old, registry.path)
        new = read_or_create(new_key or draft.new / PRIVATE, old.password)
        if new_key is None:
            draft.exchanges.append(PRIVATE)
        elif inside:
            draft.deletions.append(PRIVATE)
        if new.public_pem in (pem for _, pem in keys_of(registry, draft.entries)):
            raise ConfigError(f"{new_key} holds a key that the registry has or had. Name another.")
        write_synced(draft.new / PUBLIC, new.public_pem)
        draft.exchanges.append(PUBLIC)
        rotation = Rotation.make(registry.identity, draft.next_sequence, old, new)
        fixed = {**draft.before.fixed, PUBLIC: file_sha256(draft.new / PUBLIC)}
        details = {"envelope": json.loads(rotation.data), "fixed": {PUBLIC: fixed[PUBLIC]}}
        draft.finish(replace(draft.before, fixed=fixed), [(EVENT, details)])
    if held := known.known(registry.identity):
        now, former = new.fingerprint, {**held.former, old.fingerprint: rotation.sequence}
        known.keep(registry.identity, replace(held, fingerprint=now, former=former))
    if not inside:
        try:
            old_place.unlink()
        except OSError as error:
            raise ConfigError(
                f"The key was changed, but the old private key {old_place} is still there: {error}."
                " Delete it."
            ) from error
    return rotation
