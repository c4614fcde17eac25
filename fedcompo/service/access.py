"""Who calls: the name and the role in the certificate that TLS has verified.

Nothing that a message says counts. A certificate that expires while its connection lasts is
refused from then on.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fedcompo.errors import ContributionError
from fedcompo.names import check_client_name
from fedcompo.service.certificates import CLIENT, OPERATOR
from fedcompo.service.refusals import Code, Refused

if TYPE_CHECKING:
    import grpc

PEM = "x509_pem_cert"


@dataclass(frozen=True)
class Peer:
    """Whoever holds a certificate of the authority."""

    name: str
    operator: bool
    fingerprint: str
    """SHA-256 of the certificate, hexadecimal."""

    @property
    def signature(self) -> str:
        """What the journal and the receipts say of who asked."""
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
    peer, begins, ends = _read(bytes(pem))
    now = datetime.datetime.now(datetime.UTC)
    if not begins <= now <= ends:
        raise Refused(
            Code.UNAUTHENTICATED,
            f"The certificate of {peer.name} holds from {begins:%Y-%m-%d} to {ends:%Y-%m-%d}. "
            "Ask the authority for a new one.",
        )
    return peer


@functools.lru_cache(maxsize=1024)
def _read(pem: bytes) -> tuple[Peer, datetime.datetime, datetime.datetime]:
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        names = _values(certificate, NameOID.COMMON_NAME)
        units = _values(certificate, NameOID.ORGANIZATIONAL_UNIT_NAME)
        if len(names) != 1 or units not in ([CLIENT], [OPERATOR]):
            raise ContributionError(
                f"It has {len(names)} common names and the organizational units {units}; expected "
                f"one name, and one of {CLIENT!r} and {OPERATOR!r}."
            )
        name = check_client_name(names[0])
    except (ValueError, x509.InvalidVersion) as error:  # ContributionError is a ValueError
        raise Refused(
            Code.UNAUTHENTICATED,
            f"The certificate names nobody who could be a client. {error}",
        ) from error
    fingerprint = hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()
    peer = Peer(name, units == [OPERATOR], fingerprint)
    return peer, certificate.not_valid_before_utc, certificate.not_valid_after_utc


def _values(certificate: x509.Certificate, kind: x509.ObjectIdentifier) -> list[str]:
    return [str(attribute.value) for attribute in certificate.subject.get_attributes_for_oid(kind)]
