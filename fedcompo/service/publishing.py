"""Receives a contribution: offered, sent in pieces, checked, and added in one transaction.

Uploads are kept beside the registry, never in it, until they are added::

    <folder>/<SHA-256 of the client's name>/<SHA-256 of the announced files>/<file>

A client has one upload at a time; a new one replaces it. So nobody can fill the disk with uploads
that were begun and abandoned. They are deleted after a day. A client's folder is locked by the
operating system: the lock ends with the call, however the call ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from fedcompo.data.tasks import whole_of
from fedcompo.errors import FedcompoError, FileFormatError
from fedcompo.method.contribution import Contribution
from fedcompo.registry.registry import Registry
from fedcompo.service import registry_pb2 as wire
from fedcompo.service.access import Peer, peer_of, require_named
from fedcompo.service.gate import time_left
from fedcompo.service.limits import Limits, Places
from fedcompo.service.refusals import RETRYABLE, Code, Refused, answer_to
from fedcompo.service.transfer import CONTRIBUTION, FileEntry, Incoming, check_entries, identity
from fedcompo.storage.files import CARD
from fedcompo.storage.tensorstream import StreamedTensors

LENGTH = 8
"""Bytes at the start of a file of tensors that hold the length of its header."""
PATIENCE = 10.0
"""Seconds to wait for an earlier call of the same client, whose end the server has yet to note."""
TICK = 0.05


@dataclass(frozen=True)
class Publishing:
    """The method ``Publish``."""

    registry: Path
    """Its folder."""
    uploads: Uploads
    writers: Places
    """The place that a call takes while it changes the registry."""
    limits: Limits

    def publish(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        """Add a contribution; nothing changes unless every byte and every check is right."""
        peer = peer_of(context)
        offer, entries = self._offer(requests)
        registry = Registry(self.registry)
        files = {entry.name: entry.sha256 for entry in entries}
        members = registry.state.members
        for own, member in members.items():
            if whole_of(own) == peer.name and dict(member.files) == files:
                yield _published(own, registry, already=True)  # an answer was lost on its way
                return
        if peer.name in members and not offer.replace:
            raise Refused(
                Code.ALREADY_EXISTS,
                f"{peer.name} is in the registry already, with other files. Replace them "
                "explicitly (`--replace`), which is a removal and an addition.",
            )
        self.uploads.sweep()
        with self.uploads.opened(peer.name, entries) as incoming:
            positions = incoming.positions.items()
            have = [wire.Position(file=name, bytes=count) for name, count in positions]
            yield wire.PublishReply(have=wire.Have(positions=have))
            for request in requests:
                incoming.write(_chunk(request))
            incoming.check()
            client = self._add(peer, incoming, context, replacing=offer.replace)
        registry.refresh()
        yield _published(client, registry)

    def _offer(self, requests: Iterator[Any]) -> tuple[Any, Sequence[FileEntry]]:
        first = next(requests, None)
        if first is None or first.WhichOneof("part") != "offer":
            raise FileFormatError("A call begins with an offer of files; it began otherwise.")
        entries = [FileEntry(file.name, file.size, file.sha256) for file in first.offer.files]
        check_entries(entries, CONTRIBUTION)
        card = next(entry for entry in entries if entry.name == CARD)
        self._check_description(CARD, card.size)
        return first.offer, entries

    def _add(
        self, peer: Peer, incoming: Incoming, context: grpc.ServicerContext, *, replacing: bool
    ) -> str:
        """Add an upload to the registry; one that can never be added is deleted.

        Returns:
            The member's name.
        """
        try:
            for name in incoming.entries.keys() - {CARD}:
                self._check_tensors(incoming.folder / name)
            client = Contribution.open(incoming.folder, with_fisher=False).client
            require_named(peer, client)
            with self.writers.taken(peer, time_left(context, self.limits)):
                if not context.is_active():
                    raise Refused(Code.ABORTED, "The call was broken off; nothing was changed.")
                Registry(self.registry).add(
                    incoming.folder, replacing=replacing, requested_by=peer.signature
                )
        except FedcompoError as error:
            if answer_to(error, {})[0] not in RETRYABLE:
                incoming.discard()
            raise
        incoming.discard()
        return client

    def _check_tensors(self, path: Path) -> None:
        """Refuse tensors that would fill the memory before their shapes are checked."""
        with path.open("rb") as file:
            self._check_description(path.name, int.from_bytes(file.read(LENGTH), "little"))
        for name, (dtype, shape) in StreamedTensors(path).layout.items():
            if (size := math.prod(shape) * dtype.itemsize) > self.limits.tensor:
                raise FileFormatError(
                    f"The tensor {name[:80]!r} in {path.name} has {size} bytes, and may have "
                    f"{self.limits.tensor}. Ask an operator to add it at the registry."
                )

    def _check_description(self, name: str, size: int) -> None:
        """Refuse a huge card or header: it is read as a whole, and would fill the memory."""
        if size > self.limits.description:
            raise FileFormatError(
                f"The description in {name} has {size} bytes, and may have "
                f"{self.limits.description}."
            )


class Uploads:
    """The uploads under way, in a folder of their own."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        """Name the folder; it is made with the first upload."""
        self.folder, self._limits = folder, limits

    @contextmanager
    def opened(
        self, client: str, entries: Sequence[FileEntry], *, patience: float = PATIENCE
    ) -> Iterator[Incoming]:
        """Resume an upload, or begin it; no other call touches it meanwhile.

        Raises:
            Refused: If it is too large, or another call of the client is writing it.
        """
        self._check_size(client, entries)
        home = self._home(client)
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(home, client, patience):
            folder = home / identity(entries)
            for other in home.iterdir():
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
            folder.mkdir(exist_ok=True, mode=0o700)
            incoming = Incoming(folder, entries)
            self._check_room(entries, incoming)
            yield incoming

    def forget(self, client: str) -> None:
        """Delete what a client has sent, unless it is sending just now."""
        home = self._home(client)
        with suppress(Refused, FileNotFoundError), _locked(home, client, patience=0):
            for upload in home.iterdir():
                shutil.rmtree(upload, ignore_errors=True)

    def sweep(self) -> None:
        """Delete abandoned uploads; the clients' own folders stay, empty."""
        before = time.time() - self._limits.stale
        for upload in self.folder.glob("*/*"):
            with suppress(Refused, FileNotFoundError), _locked(upload.parent, "", patience=0):
                files = [path.stat().st_mtime for path in upload.iterdir()]
                if max([upload.stat().st_mtime, *files]) < before:
                    shutil.rmtree(upload, ignore_errors=True)

    def _home(self, client: str) -> Path:
        """A client's folder, named by a digest: some systems do not tell cases of names apart."""
        return self.folder / hashlib.sha256(client.encode()).hexdigest()[:32]

    def _check_size(self, client: str, entries: Sequence[FileEntry]) -> None:
        size = sum(entry.size for entry in entries)
        if size > self._limits.contribution:
            raise Refused(
                Code.RESOURCE_EXHAUSTED,
                f"The contribution of {client} has {size} bytes, and may have "
                f"{self._limits.contribution}. Ask an operator to add it at the registry.",
            )

    def _check_room(self, entries: Sequence[FileEntry], incoming: Incoming) -> None:
        """Refuse what does not fit on the disk: the missing bytes, and a copy for the registry."""
        needed = incoming.missing + sum(entry.size for entry in entries)
        if shutil.disk_usage(incoming.folder).free < needed + self._limits.spare:
            raise Refused(
                Code.RESOURCE_EXHAUSTED,
                f"The server's disk has no room for the {needed} bytes that this upload needs. "
                "Try again later, or tell its operator.",
            )


def _chunk(request: Any) -> Any:
    if request.WhichOneof("part") != "chunk":
        raise FileFormatError("After the offer come chunks; something else came.")
    return request.chunk


def _published(client: str, registry: Registry, *, already: bool = False) -> Any:
    published = wire.Published(client=client, already=already, root=registry.state.root)
    return wire.PublishReply(published=published)


@contextmanager
def _locked(home: Path, client: str, patience: float) -> Iterator[None]:
    deadline, handle = time.monotonic() + patience, os.open(home, os.O_RDONLY)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Refused(
                        Code.ABORTED,
                        f"Another call of {client} is at its upload. Wait for it to end.",
                    ) from None
            time.sleep(TICK)
        yield
    finally:
        os.close(handle)
