"""The client's side: publish, fetch, compose and leave, over an unreliable connection.

A broken call is repeated and resumes: what was transferred is not sent again. Every file is
compared with its SHA-256 before it takes its place.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from fedcompo.errors import ConfigError, FileFormatError
from fedcompo.names import require_utf8
from fedcompo.registry import known
from fedcompo.registry.known import Known
from fedcompo.report.progress import BYTES, step, track
from fedcompo.service import registry_pb2 as wire
from fedcompo.service.acquaintance import Acquaintance
from fedcompo.service.certificates import Credential
from fedcompo.service.methods import RegistryStub
from fedcompo.service.receipt import Receipt
from fedcompo.service.retries import ATTEMPTS, Attempts
from fedcompo.service.transfer import CONTRIBUTION, FileEntry, outgoing, received, without_paths
from fedcompo.storage.files import BACKBONE, CONFIG, MODEL_CARD, RECIPE, WEIGHTS, is_free

if TYPE_CHECKING:
    from fedcompo.registry.rederivation import Finding


MODEL = (
    frozenset({WEIGHTS, CONFIG, MODEL_CARD}),
    frozenset({WEIGHTS, CONFIG, MODEL_CARD, RECIPE, BACKBONE}),
)
"""Files of a model: those that must be there, and those that may."""
LOOPBACK = "localhost", "127.0.0.1", "[::1]"
LARGEST_MESSAGE = 16 << 20
"""Bytes; the list of a registry of thousands is the largest."""


class Client:
    """A connection to a registry's service; use it as a context.

    Example::

        with Client("fed.example.org:9443", authority, credential) as registry:
            registry.publish(Path("out/hospital-b"))
            registry.compose(Path("model"), weights={"hospital-a": 0.7, "hospital-b": 0.3})
    """

    def __init__(
        self,
        address: str,
        authority: bytes,
        credential: Credential,
        *,
        attempts: int = ATTEMPTS,
        seconds: float = 3600.0,
        insisting: bool = False,
    ) -> None:
        """Describe the connection; it is made at the first call.

        Args:
            address: ``host:port``.
            authority: Certificate of the authority that certifies the server, PEM.
            credential: The caller's own.
            attempts: How often to call before giving up.
            seconds: Longest time of one call.
            insisting: Compare each list with what this machine knows of the registry, and keep it
                (:mod:`fedcompo.service.acquaintance`).
        """
        host, colon, port = address.rpartition(":")
        if not (host and colon and port.isdecimal() and int(port) < 1 << 16):
            raise ConfigError(
                f"{address!r} is no address of a server; write host:port, such as "
                "fed.example.org:9443."
            )
        self._seconds, self._address, self._insisting = seconds, address, insisting
        self._met: Known | None = None
        self._attempts = Attempts(attempts, address)
        credentials = grpc.ssl_channel_credentials(
            authority, credential.key, credential.certificate
        )
        options = [("grpc.max_receive_message_length", LARGEST_MESSAGE)]
        if host in LOOPBACK:  # no proxy of the house reaches it
            options.append(("grpc.enable_http_proxy", 0))
        self._channel = grpc.secure_channel(address, credentials, options)
        self._stub = RegistryStub(self._channel)

    def __enter__(self) -> Client:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the connection."""
        self._channel.close()

    def publish(self, folder: Path, *, replace: bool = False) -> Any:
        """Hand in the contribution that lies in a folder.

        Args:
            folder: As ``Contribution.save`` writes it. Paths among its settings are not sent.
            replace: Take the place of the caller's earlier one.

        Returns:
            The message ``Published``.

        Raises:
            FileFormatError: If the folder holds no contribution.
            ServiceError: If the server refuses, or cannot be reached.
        """
        with without_paths(folder) as clean:
            return self._publish(clean, replace)

    def _publish(self, folder: Path, replace: bool) -> Any:
        step("hashing")
        names = [n for n in sorted(CONTRIBUTION[1]) if (folder / n).is_file()]
        if not CONTRIBUTION[0].issubset(names):
            raise FileFormatError(
                f"{folder} holds no contribution; expected the files "
                f"{', '.join(sorted(CONTRIBUTION[0]))}. Name the folder of one."
            )
        with _opened(folder, names) as files:
            entries = [FileEntry.of(name, file) for name, file in files.items()]
        announced = [wire.File(name=e.name, size=e.size, sha256=e.sha256) for e in entries]
        offer = wire.PublishRequest(offer=wire.Offer(files=announced, replace=replace))

        def chunks(offsets: Mapping[str, int]) -> Iterator[wire.Chunk]:
            # Opened anew for each attempt: the thread of the last one may still be reading.
            with _opened(folder, names) as files:
                yield from outgoing(files, entries, offsets)

        return self._attempts.make(lambda: self._published(offer, chunks))

    def fetch(self, output: Path, client: str = "") -> Any:
        """Get a contribution back; returns the message ``Content``.

        Args:
            output: A new folder.
            client: Client whose contribution it is; empty: the caller.

        Raises:
            ConfigError: If something is at ``output`` already.
            ServiceError: If the server refuses, or cannot be reached.
        """
        require_utf8(client)

        def call(resume: Any) -> Any:
            return self._stub.Fetch(
                wire.FetchRequest(client=client, resume=resume), timeout=self._seconds
            )

        return self._download(output, call, CONTRIBUTION)

    def compose(
        self,
        output: Path,
        *,
        only: Sequence[str] = (),
        without: Sequence[str] = (),
        weights: Mapping[str, float] | None = None,
        scale: float | None = None,
    ) -> Any:
        """Get a model composed; returns the message ``Content``.

        Args:
            output: A new folder, which timm will load.
            only: Clients to take; empty: all, or all that have a weight.
            without: Clients to leave out.
            weights: Coefficients by client; None: the registry's own.
            scale: Factor on the sum; None: the registry's own.

        Raises:
            ConfigError: If something is at ``output`` already.
            ServiceError: If the server refuses, or cannot be reached.
        """
        require_utf8(*only, *without, *(weights or ()))

        def call(resume: Any) -> Any:
            request = wire.ComposeRequest(
                only=only, without=without, weights=weights, scale=scale, resume=resume
            )
            return self._stub.Compose(request, timeout=self._seconds)

        return self._download(output, call, MODEL)

    def remove(self, client: str = "", *, reason: str = "") -> Receipt:
        """Leave, or take a client out; raises ``ServiceError`` if the server refuses."""
        require_utf8(client, reason)
        request = wire.RemoveRequest(client=client, reason=reason)
        reply = self._attempts.make(lambda: self._stub.Remove(request, timeout=self._seconds))
        return Receipt(reply.record, reply.public_key, self._met)

    def list(self) -> Any:
        """List the members; returns the message ``ListReply``.

        Raises:
            ServiceError: If the server refuses, cannot be reached, or its registry is not the one
                that this machine knows.
        """
        if not self._insisting:
            return self._list(0)
        before = Acquaintance(self._address, known.read())
        reply = self._list(sequence := before.sequence())
        if sequence != before.sequence(reply.identity):  # it was met elsewhere
            reply = self._list(before.sequence(reply.identity))
        self._met = before.greet(reply)
        return reply

    def _list(self, known_sequence: int) -> Any:
        request = wire.ListRequest(known_sequence=known_sequence)
        return self._attempts.make(lambda: self._stub.List(request, timeout=self._seconds))

    def verify(self, record: bytes = b"") -> Sequence[Finding]:
        """Let the server verify every claim of the registry, or of a receipt."""
        from fedcompo.registry.rederivation import (
            Finding,  # takes seconds to import, as PyTorch does
        )

        request = wire.VerifyRequest(record=record)
        reply = self._attempts.make(lambda: self._stub.Verify(request, timeout=self._seconds))
        return [
            Finding(f.claim, f.holds if f.HasField("holds") else None, f.detail)
            for f in reply.findings
        ]

    def _published(
        self, offer: Any, chunks: Callable[[Mapping[str, int]], Iterator[wire.Chunk]]
    ) -> Any:
        """Make one attempt to publish: offer, learn what the server has, send the rest."""
        total = sum(file.size for file in offer.offer.files)
        positions: queue.SimpleQueue[Mapping[str, int] | None] = queue.SimpleQueue()

        def requests() -> Iterator[Any]:
            yield offer
            if (offsets := positions.get()) is None:
                return
            count(sum(offsets.values()))
            for chunk in chunks(offsets):
                yield wire.PublishRequest(chunk=chunk)
                count(len(chunk.data))

        published = None
        with track(total, BYTES, "sending") as count:
            call = self._stub.Publish(requests(), timeout=self._seconds)
            try:
                for reply in call:
                    if reply.WhichOneof("part") == "have":
                        positions.put({p.file: p.bytes for p in reply.have.positions})
                    else:
                        published = reply.published
            finally:
                positions.put(None)  # or the generator of requests would wait for ever
        return published

    def _download(
        self, output: Path, call: Callable[[Any], Any], names: tuple[frozenset[str], frozenset[str]]
    ) -> Any:
        if not is_free(output):
            raise ConfigError(f"{output} holds something already; name a new folder.")
        return self._attempts.make(lambda: received(output, call, names))


@contextmanager
def _opened(folder: Path, names: Sequence[str]) -> Iterator[dict[str, BufferedReader]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context((folder / name).open("rb")) for name in names}
