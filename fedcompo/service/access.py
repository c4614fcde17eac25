"""Identifies the caller of a method, and checks what it may do.

The caller's name and role are those in the certificate that TLS has verified; nothing in a message
changes them. A certificate that expires while its connection lasts is refused from then on.

================  ==============================  ========
call              a client                        operator
================  ==============================  ========
List, Verify      yes                             yes
health            yes                             yes
Publish           its own                         its own
Fetch             its own                         any
Compose           as the :class:`Audience` says   yes
Remove            its own                         any
================  ==============================  ========

"Its own" is the contribution that bears the name in the certificate, or each shard of it,
``<name>.shard-<number>``. No certificate bears the name of a shard. Nobody publishes in another's
name, operators neither: what comes by mail they add at the registry itself.

A model of one client alone is θ₀ plus that client's task vector, with a head fitted to its
statistics; and two models of many clients can be subtracted. So whoever composes freely can compute
the task vectors, though a client's Fisher, statistics and own head are never sent. Therefore
operators alone compose, unless the service is opened for members; a model for them then holds so
many others at least, which hinders reading but not subtracting.

A certificate can be revoked before it expires, because a key was lost or its holder must leave. The
operator lists revoked certificates in a file. The service reads it again whenever it has changed,
so nobody need restart it.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fedcompo.data.tasks import check_whole, whole_of
from fedcompo.errors import ConfigError, ContributionError
from fedcompo.names import check_client_name
from fedcompo.service.certificates import CLIENT, OPERATOR, key_digest
from fedcompo.service.refusals import LOGGER, Code, Refused

if TYPE_CHECKING:
    import grpc

PEM = "x509_pem_cert"
"""Where gRPC keeps the caller's certificate."""
FINGERPRINT = re.compile(r"[0-9a-f]{64}", re.ASCII)
"""SHA-256 of a certificate, as it stands in the journal; colons are left out before."""
SETTLED = 1.0
"""Seconds without a change after which a list counts as complete: writing it takes a moment."""


@dataclass(frozen=True)
class Peer:
    """A caller, who holds a certificate of the authority."""

    name: str
    operator: bool
    fingerprint: str
    """SHA-256 of the certificate, hexadecimal."""
    key: str = ""
    """SHA-256 of its public key."""

    @property
    def account(self) -> tuple[str, bool]:
        """Whose calls are counted together, also under a renewed certificate."""
        return self.name, self.operator

    @property
    def signature(self) -> str:
        """The caller, as the journal and the receipts name it."""
        role = OPERATOR if self.operator else CLIENT
        return f"{self.name} ({role}, certificate SHA-256 {self.fingerprint})"


def peer_of(context: grpc.ServicerContext) -> Peer:
    """Return who calls.

    Raises:
        Refused: If there is no certificate, it does not hold today, or it names nobody.
    """
    pem = next(iter(context.auth_context().get(PEM, ())), b"")
    if not pem:
        raise Refused(
            Code.UNAUTHENTICATED, "No certificate came with the call. Connect by mutual TLS."
        )
    peer, begins, ends = _read_certificate(bytes(pem))
    now = datetime.datetime.now(datetime.UTC)
    if not begins <= now <= ends:
        raise Refused(
            Code.UNAUTHENTICATED,
            f"The certificate of {peer.name} holds from {begins:%Y-%m-%d} to {ends:%Y-%m-%d}. "
            "Ask the authority for a new one.",
        )
    return peer


class Audience(StrEnum):
    """Who may compose models."""

    MEMBERS = "members"
    """Clients that are in the registry now, and operators."""
    OPERATORS = "operators"


def require_owner(peer: Peer, client: str, what: str) -> None:
    """Raise ``Refused`` unless the contribution is the caller's own, or an operator calls."""
    if peer.name != whole_of(client) and not peer.operator:
        raise Refused(
            Code.PERMISSION_DENIED,
            f"{peer.name} may {what} its own contribution alone, not that of {client!r}. "
            "Ask an operator.",
        )


def require_named(peer: Peer, client: object) -> None:
    """Raise ``Refused`` unless a published contribution bears the caller's name."""
    if whole_of(str(client)) != peer.name:
        raise Refused(
            Code.PERMISSION_DENIED,
            f"The contribution is of client {str(client)[:80]!r}, but the certificate is of "
            f"{peer.name!r}. Everyone publishes in its own name.",
        )


def require_audience(peer: Peer, audience: Audience, members: Iterable[str]) -> None:
    """Raise ``Refused`` unless the caller may compose."""
    if peer.operator or (audience is Audience.MEMBERS and peer.name in map(whole_of, members)):
        return
    whom = "clients that are in it" if audience is Audience.MEMBERS else "operators"
    raise Refused(
        Code.PERMISSION_DENIED,
        f"Of this registry {whom} may compose models; {peer.name} is none of them.",
    )


def require_many(
    peer: Peer, clients: Iterable[str], weights: Mapping[str, float] | None, least: int
) -> None:
    """Raise ``Refused`` unless a model for a member holds so many others at least, or none.

    The caller can subtract its own task vector, so it does not count; others count once, whatever
    the number of their shards. With weights that it chose,
    none of the others may have more than ``1 / least`` of theirs: a tiny weight hides nobody.
    """
    by_client = dict[str, float]()
    for client in clients:
        own = (weights or {}).get(client, 0.0 if weights else 1.0)
        by_client[whole_of(client)] = by_client.get(whole_of(client), 0.0) + own
    others = [weight for client, weight in by_client.items() if client != peer.name]
    even = weights is None or max(others, default=0.0) * least <= sum(others) * (1 + 1e-6)
    if others and not peer.operator and (len(others) < least or not even):
        raise Refused(
            Code.PERMISSION_DENIED,
            f"A model for {peer.name} must hold {least} other clients or more, none of them with "
            f"more than 1/{least} of the others' weight. Name more of them, or ask an operator.",
        )


class Revoked:
    """A list of revoked certificates: the SHA-256 of each on a line; ``#`` begins a comment.

    A line may also be what ``openssl x509 -noout -fingerprint -sha256`` prints, or the SHA-256 of a
    public key: that locks out all its certificates, also those that were renewed.
    """

    def __init__(self, file: Path | None = None) -> None:
        """Read the list; without a file it is empty.

        Raises:
            ConfigError: If it cannot be read, or a line is no SHA-256.
        """
        self._file, self._lock = file, threading.Lock()
        self._seen = _stamp(file)
        self._fingerprints, faults = (frozenset[str](), ()) if file is None else _read_list(file)
        self._reported: tuple[str, ...] = ()
        if faults:
            raise ConfigError("\n".join(faults))

    def require_valid(self, peer: Peer) -> None:
        """Raise ``Refused`` if a caller's certificate is on the list as it is now."""
        if self._current() & {peer.fingerprint, peer.key}:
            raise Refused(
                Code.UNAUTHENTICATED,
                f"This certificate of {peer.name} was revoked. Ask the authority for a new one.",
            )

    def _current(self) -> frozenset[str]:
        """Return the list, read again if its file has changed.

        While the file has a fault, or may still be being written, nothing is taken off the list.
        """
        with self._lock:
            if self._file is not None and (stamp := _stamp(self._file)) != self._seen:
                fingerprints, faults = _read_list(self._file)
                settled = stamp is not None and not 0 <= time.time() - stamp[0] / 1e9 < SETTLED
                if faults or not settled:
                    fingerprints |= self._fingerprints
                self._fingerprints = fingerprints
                if settled and not faults:
                    self._seen = stamp
                if faults and faults != self._reported:
                    for fault in faults:
                        LOGGER.error("The last revoked certificates stay revoked: %s", fault)
                self._reported = faults
            return self._fingerprints


@functools.lru_cache(maxsize=1024)
def _read_certificate(pem: bytes) -> tuple[Peer, datetime.datetime, datetime.datetime]:
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        names = _subject_values(certificate, NameOID.COMMON_NAME)
        units = _subject_values(certificate, NameOID.ORGANIZATIONAL_UNIT_NAME)
        if len(names) != 1 or units not in ([CLIENT], [OPERATOR]):
            raise ContributionError(
                f"It has {len(names)} common names and the organizational units {units}; expected "
                f"one name, and one of {CLIENT!r} and {OPERATOR!r}."
            )
        name = check_whole(check_client_name(names[0]))
    except (ValueError, x509.InvalidVersion) as error:  # ContributionError is a ValueError
        raise Refused(
            Code.UNAUTHENTICATED, f"The certificate names nobody who could be a client. {error}"
        ) from error
    fingerprint = hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()
    peer = Peer(name, units == [OPERATOR], fingerprint, key_digest(certificate.public_key()))
    return peer, certificate.not_valid_before_utc, certificate.not_valid_after_utc


def _subject_values(certificate: x509.Certificate, kind: x509.ObjectIdentifier) -> list[str]:
    return [str(attribute.value) for attribute in certificate.subject.get_attributes_for_oid(kind)]


def _stamp(file: Path | None) -> tuple[int, ...] | None:
    """Values that change with a file's content, or with who may read it."""
    try:
        status = file.stat() if file is not None else None
    except OSError:
        return None
    return status and (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)


def _read_list(file: Path) -> tuple[frozenset[str], tuple[str, ...]]:
    """Read a list of fingerprints; returns them, and the faults of the file."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return frozenset(), (f"The revoked certificates cannot be read from {file}: {error}",)
    fingerprints, faults = [], []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].rpartition("=")[2].strip().replace(":", "").lower()
        if FINGERPRINT.fullmatch(text):
            fingerprints.append(text)
        elif text:
            faults.append(
                f"{file}, line {number}: {line.strip()!r} is no SHA-256 of a certificate; expected "
                "64 hexadecimal digits, as in the journal, or what `openssl x509 -noout "
                "-fingerprint -sha256 -in NAME.crt` prints."
            )
    return frozenset(fingerprints), tuple(faults)
