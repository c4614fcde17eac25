"""Taking a contribution in: offered, sent in pieces, checked, and added in one transaction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc

from fedcompo.errors import FedcompoError, FileFormatError
from fedcompo.method.contribution import Contribution
from fedcompo.registry.registry import Registry
from fedcompo.service import registry_pb2 as wire
from fedcompo.service.access import Peer, peer_of
from fedcompo.service.gate import time_left
from fedcompo.service.limits import Limits, Places
from fedcompo.service.permissions import require_named
from fedcompo.service.refusals import PASSING, Code, Refused, answer_to
from fedcompo.service.transfer import FileEntry, Incoming, Part, check_entries
from fedcompo.service.uploads import Uploads
from fedcompo.storage.files import CARD, CONTENT, FISHER
from fedcompo.storage.tensorstream import StreamedTensors

REQUIRED = frozenset({CONTENT, CARD})
ALLOWED = REQUIRED | {FISHER}
LENGTH = 8
"""Bytes at the start of a file of tensors that tell the length of its header."""


class Publishing:
    """The method ``Publish``."""

    def __init__(self, registry: Path, uploads: Uploads, writers: Places, limits: Limits) -> None:
        """Say where to, by way of which folder, and who else writes."""
        self._registry, self._uploads = registry, uploads
        self._writers, self._limits = writers, limits

    def publish(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        """Take in a contribution; nothing changes unless every byte and every check is right."""
        peer = peer_of(context)
        offer, entries = self._offer(requests)
        registry = Registry(self._registry)
        member = registry.state.members.get(peer.name)
        if member and dict(member.files) == {entry.name: entry.sha256 for entry in entries}:
            yield _published(peer, registry, already=True)  # an answer was lost on its way
            return
        if member and not offer.replace:
            raise Refused(
                Code.ALREADY_EXISTS,
                f"{peer.name} is in the registry already, with other files. Replace them "
                "explicitly (`--replace`), which is a removal and an addition.",
            )
        self._uploads.sweep()
        with self._uploads.opened(peer.name, entries) as incoming:
            positions = incoming.positions.items()
            have = [wire.Position(file=name, bytes=count) for name, count in positions]
            yield wire.PublishReply(have=wire.Have(positions=have))
            for request in requests:
                incoming.write(_part(request))
            incoming.check()
            self._take_in(peer, incoming, context, replacing=offer.replace)
        registry.refresh()
        yield _published(peer, registry)

    def _offer(self, requests: Iterator[Any]) -> tuple[Any, Sequence[FileEntry]]:
        first = next(requests, None)
        if first is None or first.WhichOneof("part") != "offer":
            raise FileFormatError("A call begins with an offer of files; it began otherwise.")
        entries = [FileEntry(file.name, file.size, file.sha256) for file in first.offer.files]
        check_entries(entries, allowed=ALLOWED, required=REQUIRED)
        card = next(entry for entry in entries if entry.name == CARD)
        self._require_modest(CARD, card.size)
        return first.offer, entries

    def _take_in(
        self, peer: Peer, incoming: Incoming, context: grpc.ServicerContext, *, replacing: bool
    ) -> None:
        """Add what has come; what can never be added is deleted."""
        try:
            for name in incoming.entries.keys() - {CARD}:
                self._require_bearable(incoming.folder / name)
            require_named(peer, Contribution.open(incoming.folder, with_fisher=False).client)
            with self._writers.taken(time_left(context, self._limits)):
                if not context.is_active():
                    raise Refused(Code.ABORTED, "The call was broken off; nothing was changed.")
                Registry(self._registry).add(
                    incoming.folder, replacing=replacing, requested_by=peer.signature
                )
        except FedcompoError as error:
            if answer_to(error, {})[0] not in PASSING:
                incoming.discard()
            raise
        incoming.discard()

    def _require_bearable(self, path: Path) -> None:
        """Refuse tensors that would fill the memory before anyone could look at their shapes."""
        with path.open("rb") as file:
            self._require_modest(path.name, int.from_bytes(file.read(LENGTH), "little"))
        for name, (dtype, shape) in StreamedTensors(path).layout.items():
            if (size := math.prod(shape) * dtype.itemsize) > self._limits.tensor:
                raise FileFormatError(
                    f"The tensor {name[:80]!r} in {path.name} has {size} bytes, and may have "
                    f"{self._limits.tensor}. Ask an operator to add it at the registry."
                )

    def _require_modest(self, name: str, size: int) -> None:
        """Descriptions are read as a whole: one that is huge would fill the memory."""
        if size > self._limits.description:
            raise FileFormatError(
                f"The description in {name} has {size} bytes, and may have "
                f"{self._limits.description}."
            )


def _part(request: Any) -> Part:
    if request.WhichOneof("part") != "chunk":
        raise FileFormatError("After the offer come chunks; something else came.")
    return Part(request.chunk.file, request.chunk.offset, request.chunk.data)


def _published(peer: Peer, registry: Registry, *, already: bool = False) -> Any:
    told = wire.Published(client=peer.name, already=already, root=registry.state.root)
    return wire.PublishReply(published=told)
