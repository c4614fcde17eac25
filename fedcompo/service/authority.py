"""The authority of a federation: it vouches for the server, for operators and for each client.

Everybody trusts its certificate alone. The extended key usage of those it issues keeps a client
from posing as the server. Keys lie on the curve P-384. The extensions are those that Python's
strict verification (the default since 3.13) asks for. No certificate holds longer than the
authority's own.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedcompo.errors import ConfigError
from fedcompo.service.certificates import (
    CLIENT,
    OPERATOR,
    SERVER,
    Credential,
    Holder,
    new_key,
    read_credential,
    subject_of,
)
from fedcompo.service.lifetimes import require_current
from fedcompo.storage.files import private_pem

AUTHORITY, AUTHORITY_STEM = "authority", "ca"
AUTHORITY_DAYS, DAYS = 3650, 825
"""Days that the authority's certificate holds, and those that it issues."""
CLOCK_SKEW = datetime.timedelta(days=1)
"""How long before its issue a certificate begins: clocks of other machines may be slow."""


@dataclass(frozen=True)
class Authority:
    """The authority, whose certificates everybody in a federation trusts.

    Attributes:
        credential: Its own certificate, which everybody gets, and its key, which nobody gets.
    """

    credential: Credential

    @classmethod
    def create(cls, name: str = "fedcompo CA", days: int = AUTHORITY_DAYS) -> Authority:
        """Make a new authority.

        Args:
            name: Its common name.
            days: How long its certificate is valid; negative: it has expired (for tests).
        """
        key = new_key()
        subject = subject_of(name, AUTHORITY)
        builder = (
            _builder(subject, subject, key.public_key(), _end(days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
        )
        return cls(Credential(_signed(builder, key), private_pem(key)))

    @classmethod
    def load(cls, certificate: Path, key: Path) -> Authority:
        """Read the files that :meth:`save` wrote.

        Raises:
            ConfigError: If a file cannot be read, the certificate is no authority's or has ended,
                or the two do not belong together.
        """
        authority = cls(read_credential(certificate, key))
        try:
            _private_key(authority.credential.key)
            found = authority.credential.parsed.extensions
            if not found.get_extension_for_class(x509.BasicConstraints).value.ca:
                raise ValueError("it is of a server or client")
        except (ValueError, x509.ExtensionNotFound) as error:
            raise ConfigError(f"{certificate}, expected an authority's: {error}.") from error
        require_current(authority.credential.parsed)
        return authority

    def save(self, folder: Path) -> None:
        """Write ``ca.crt``, and ``ca.key`` for its owner alone; neither may exist yet."""
        self.credential.save(folder, AUTHORITY_STEM)

    def certify(self, holder: Holder, key: ec.EllipticCurvePublicKey, *, days: int = DAYS) -> bytes:
        """Certify that a key is a holder's; returns the certificate in PEM.

        Args:
            holder: Who it is for.
            key: Its public key, on the curve P-384.
            days: How long the certificate is valid; negative: it has expired (for tests).
        """
        own = self.credential.parsed
        identifier = own.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
        server = holder.role == SERVER
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        end = min(_end(days), own.not_valid_after_utc)
        builder = (
            _builder(holder.subject, own.subject, key, end)
            .add_extension(issuer, critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        )
        if hosts := holder.alternatives:
            builder = builder.add_extension(hosts, critical=False)
        return _signed(builder, _private_key(self.credential.key))

    def issue_server(self, hosts: Iterable[str], *, days: int = DAYS) -> Credential:
        """Make a key for a server that is reached under these hosts, and certify it."""
        return self._issue(Holder.server(hosts), days)

    def issue_client(self, name: str, *, operator: bool = False, days: int = DAYS) -> Credential:
        """Make a key for a client, or for an operator of the server, and certify it."""
        return self._issue(Holder(name, OPERATOR if operator else CLIENT), days)

    def _issue(self, holder: Holder, days: int) -> Credential:
        key = new_key()
        return Credential(self.certify(holder, key.public_key(), days=days), private_pem(key))


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether an authority has signed a certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"it holds a {type(key).__name__}, expected a key on an elliptic curve")
    return key


def _end(days: int) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, end: datetime.datetime
) -> x509.CertificateBuilder:
    """Begin a certificate with the fields that all certificates have."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(_end(days=0), end) - CLOCK_SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _signed(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> bytes:
    """Sign a certificate; returns it in PEM."""
    return builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)
