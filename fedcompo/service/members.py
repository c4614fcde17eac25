"""The methods that answer in one message: ``Remove``, ``List`` and ``Verify``."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc

from fedcompo.data.tasks import whole_of
from fedcompo.errors import ContributionError, RegistryError
from fedcompo.registry.checkpoint import Checkpoint
from fedcompo.registry.inspection import DAMAGED
from fedcompo.registry.journal import Entry
from fedcompo.registry.record_verification import verify_record
from fedcompo.registry.rederivation import Finding
from fedcompo.registry.registry import Registry
from fedcompo.registry.rotation import key_at, rotations_in
from fedcompo.registry.signing import Signer, signer_for
from fedcompo.registry.state import Member, State
from fedcompo.registry.transaction import STATE
from fedcompo.registry.verification import verify_registry
from fedcompo.service import registry_pb2 as wire
from fedcompo.service.access import peer_of, require_owner
from fedcompo.service.downloads import require_members
from fedcompo.service.gate import time_left
from fedcompo.service.limits import Limits, Places
from fedcompo.service.publishing import Uploads
from fedcompo.service.refusals import Code, Refused, redacted

LARGEST_LIST = 8 << 20
"""Bytes of the names of classes in a list, of all members together; the rest is counted."""
LONGEST_REASON = 1000
"""Characters; a reason stands in the receipt for good."""
CHANGED = "The registry was changed while it was verified. Try again."


@functools.lru_cache(maxsize=2)
def _witness(
    path: Path, key: Path | None, journal_sha256: str
) -> tuple[Signer, Sequence[str], Sequence[bytes]]:
    """Read, once a change, who signs, the SHA-256 of each line of the journal, and rotations."""
    registry = Registry(path)
    entries = registry.entries()
    rotations = [rotation.data for rotation in rotations_in(entries, registry.identity)]
    return signer_for(path, key), [entry.sha256 for entry in entries], rotations


@dataclass(frozen=True)
class Members:
    """The methods ``Remove``, ``List`` and ``Verify``."""

    registry: Path
    """Its folder."""
    uploads: Uploads
    writers: Places
    """The place that a call takes while it changes the registry."""
    heavy: Places
    """The places of calls that compute for long."""
    limits: Limits
    hidden: Mapping[Path, str]
    """Folders that no answer may name, and what to call them instead."""
    key: Path | None = None
    """File of the registry's private key; None: as the environment says, or in the registry."""

    def remove(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Remove a client and return the receipt; for one that has left, its last receipt."""
        peer = peer_of(context)
        client = request.client or peer.name
        require_owner(peer, client, "remove")
        if len(request.reason) > LONGEST_REASON:
            raise Refused(
                Code.INVALID_ARGUMENT,
                f"The reason has {len(request.reason)} characters, and may have {LONGEST_REASON}.",
            )
        with self.writers.taken(peer, time_left(context, self.limits)):
            registry = Registry(self.registry)
            if client in registry.clients:
                try:
                    by, why = peer.signature, request.reason
                    registry.remove(client, requested_by=by, reason=why, key=self.key)
                except ContributionError:  # another process was faster
                    registry.refresh()
        self.uploads.forget(whole_of(client))
        entry = _last_removal(registry, client)
        return wire.RemoveReply(
            record=(registry.path / str(entry.details["record"])).read_bytes(),
            public_key=key_at(registry, registry.entries(), entry.sequence),
        )

    def list(self, request: Any, context: grpc.ServicerContext) -> Any:
        """List the members, and sign what the registry is."""
        registry, line = Registry(self.registry), request.known_sequence
        state = registry.state
        share = LARGEST_LIST // max(1, len(state.members))
        signer, lines, rotations = _witness(self.registry, self.key, state.journal_sha256)
        earlier = (line, lines[line - 1]) if 0 < line <= state.sequence else (0, "")
        return wire.ListReply(
            identity=registry.identity,
            base=state.base,
            root=state.root,
            sequence=state.sequence,
            members=[_listed(member, share) for member in state.members.values()],
            public_key=signer.public_pem,
            checkpoint=Checkpoint.of(registry.identity, state, earlier).sealed(signer),
            rotations=rotations,
        )

    def verify(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Verify every claim of the registry, or of a receipt."""
        with self.heavy.taken(peer_of(context), time_left(context, self.limits)):
            before = State.read(self.registry / STATE)
            try:
                findings = self._findings(request.record)
            except FileNotFoundError as error:  # a change deleted it between two looks
                raise RegistryError(CHANGED) from error
            failed = any(finding.holds is False for finding in findings)
            if failed and State.read(self.registry / STATE) != before:
                raise RegistryError(CHANGED)
        return wire.VerifyReply(
            findings=[
                wire.Finding(
                    claim=redacted(finding.claim, self.hidden),
                    holds=finding.holds,
                    detail=redacted(finding.detail, self.hidden),
                )
                for finding in findings
            ]
        )

    def _findings(self, record: bytes) -> Sequence[Finding]:
        if not record:
            return verify_registry(self.registry)
        with tempfile.TemporaryDirectory(prefix="fedcompo-verify-") as folder:
            path = Path(folder) / "record.json"
            path.write_bytes(record)
            findings = verify_record(path, registry=Registry(self.registry))
            inside = {path: "the receipt"}
            return [replace(f, detail=redacted(f.detail, inside)) for f in findings]


def _listed(member: Member, share: int) -> Any:
    """Describe a member in so many bytes; what cannot be described keeps nobody else from it."""
    sizes = itertools.accumulate(len(str(name).encode(errors="replace")) for name in member.classes)
    classes = [c for c, size in zip(member.classes, sizes, strict=True) if size <= share]
    if more := len(member.classes) - len(classes):
        classes.append(f"… and {more} more")
    try:
        return wire.Member(
            client=member.client,
            kind=member.kind,
            num_examples=member.num_examples,
            classes=classes,
            added=member.added,
        )
    except (ValueError, TypeError):  # an older version took it in
        return wire.Member(client=member.client, kind=DAMAGED)


def _last_removal(registry: Registry, client: str) -> Entry:
    """The newest line of the journal that tells of a client that has left."""
    registry.refresh()
    for entry in reversed(registry.entries()):
        if entry.details.get("client") == client and "record" in entry.details:
            return entry
    require_members(registry, [client])  # it was never there
    raise RegistryError(f"{client} came back meanwhile. Try again.")
