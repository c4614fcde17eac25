"""Sends a contribution as it was published, or a model composed for the caller.

Files are opened, and hashed, before the first byte is sent: a removal meanwhile deletes their
names, not the open files. A model whose clients changed while it was composed is not sent.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import grpc

from fedcompo.errors import ConfigError, ContributionError, RegistryError
from fedcompo.export.folder import publish
from fedcompo.export.selection import from_registry
from fedcompo.names import require_known
from fedcompo.registry.registry import Registry
from fedcompo.registry.state import Member
from fedcompo.service import registry_pb2 as wire
from fedcompo.service.access import (
    Audience,
    Peer,
    peer_of,
    require_audience,
    require_many,
    require_owner,
)
from fedcompo.service.gate import time_left
from fedcompo.service.limits import Limits, Places
from fedcompo.service.refusals import Code, Refused
from fedcompo.service.transfer import FileEntry, identity, outgoing


@dataclass(frozen=True)
class Downloads:
    """The methods ``Fetch`` and ``Compose``."""

    registry: Path
    """Its folder."""
    folder: Path
    """Where models are composed."""
    audience: Audience
    least: int
    """How many others a model holds at least, unless it is for an operator."""
    heavy: Places
    """The places of calls that compute for long."""
    models: Places
    """The places of models on disk."""
    limits: Limits

    def fetch(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        """Send a member's files."""
        peer = peer_of(context)
        client = request.client or peer.name
        require_owner(peer, client, "fetch")
        registry = Registry(self.registry)
        require_members(registry, [client])
        member = registry.member(client)
        with ExitStack() as stack:
            files = _member_files(registry, member, stack)
            entries = [FileEntry.of(name, file) for name, file in files.items()]
            for entry in entries:
                if entry.sha256 != member.files[entry.name]:
                    path = registry.path / member.folder / entry.name
                    registry.check_file(path, member.files[entry.name])
                    raise RegistryError("The registry was changed meanwhile. Try again.")
            content = wire.Content(clients=[client], root=registry.state.root)
            yield from _sent(content, files, entries, request.resume)

    def compose(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        """Compose a model, and send it."""
        peer = peer_of(context)
        require_audience(peer, self.audience, Registry(self.registry).clients)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        wait = time_left(context, self.limits)
        with self.models.taken(peer, wait), ExitStack() as stack:
            with (
                self.heavy.taken(peer, wait),
                tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as scratch,
            ):
                if not context.is_active():
                    raise Refused(Code.ABORTED, "The call was broken off.")
                folder = Path(scratch) / "model"
                content = self._composed(folder, peer, request)
                files = {
                    path.name: stack.enter_context(path.open("rb"))
                    for path in sorted(folder.iterdir())
                }
            entries = [FileEntry.of(name, file) for name, file in files.items()]
            yield from _sent(content, files, entries, request.resume)

    def _composed(self, output: Path, peer: Peer, request: Any) -> Any:
        registry = Registry(self.registry)
        weights = dict(request.weights) or None
        require_members(registry, [*request.only, *request.without, *(weights or ())])
        _check_weights(weights)
        before = registry.state
        selection = from_registry(
            registry,
            only=tuple(request.only),
            without=tuple(request.without),
            weights=weights,
            scale=request.scale if request.HasField("scale") else None,
        )
        require_many(peer, selection.pool.clients, weights, self.least)
        publish(output, selection)
        registry.refresh()
        now = registry.state.members
        if gone := [c for c in selection.pool.clients if now.get(c) != before.members[c]]:
            raise RegistryError(
                f"The registry was changed while the model was being composed: {', '.join(gone)} "
                "left or came anew. Try again."
            )
        return wire.Content(clients=selection.pool.clients, root=before.root)


def require_members(registry: Registry, clients: Sequence[str]) -> None:
    """Raise ``Refused`` unless all of them are in the registry."""
    try:
        require_known(clients, registry.clients, "registry")
    except ContributionError as error:
        raise Refused(Code.NOT_FOUND, str(error)) from error


def _check_weights(weights: Mapping[str, float] | None) -> None:
    """Refuse weights outside [0, 1], which a message can hold."""
    for client, weight in (weights or {}).items():
        if not (math.isfinite(weight) and 0 <= weight <= 1):
            raise ConfigError(f"The weight of {client} must lie between 0 and 1, got {weight}.")


def _member_files(
    registry: Registry, member: Member, stack: ExitStack
) -> dict[str, BufferedReader]:
    files: dict[str, BufferedReader] = {}
    for name, digest in sorted(member.files.items()):
        path = registry.path / member.folder / name
        try:
            files[name] = stack.enter_context(path.open("rb"))
        except OSError:
            registry.check_file(path, digest)  # it knows why
            raise
    return files


def _sent(
    content: Any, files: Mapping[str, BufferedReader], entries: Sequence[FileEntry], resume: Any
) -> Iterator[Any]:
    """Describe the files, then send the rest; a caller that has other content gets all."""
    content.id = identity(entries)
    content.files.extend(wire.File(name=e.name, size=e.size, sha256=e.sha256) for e in entries)
    yield wire.Download(content=content)
    same = resume.id == content.id
    offsets = {position.file: position.bytes for position in resume.positions} if same else {}
    for chunk in outgoing(files, entries, offsets):
        yield wire.Download(chunk=chunk)
