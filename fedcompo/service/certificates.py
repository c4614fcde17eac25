"""X.509 certificates of a federation: one authority vouches for the server and for each client.

Everybody trusts the authority's certificate alone. A credential says who its holder is (common
name) and what it may be (organizational unit: ``server``, ``client`` or ``operator``); its extended
key usage keeps a client from posing as the server. Keys lie on the curve P-384. The extensions are
those that Python's strict verification (the default since 3.13) asks for.

Files are checked when they are read: gRPC takes anything for a certificate, and then fails to
connect without saying why.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedcompo.data.tasks import check_whole
from fedcompo.errors import ConfigError
from fedcompo.names import check_client_name
from fedcompo.storage.files import UNREADABLE, private_pem, write_private

SERVER, CLIENT, OPERATOR = "server", "client", "operator"
"""Organizational units: the role of a certificate's holder."""

ORGANIZATION = "fedcompo"
AUTHORITY_STEM = "ca"
LONGEST_COMMON_NAME = 64
"""Bytes; X.509 allows no more."""
CLOCK_SKEW = datetime.timedelta(days=1)
"""How long before its issue a certificate begins: clocks of other machines may be slow."""
DNS_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?", re.ASCII)


@dataclass(frozen=True)
class Credential:
    """A certificate and its private key, both in PEM."""

    certificate: bytes
    key: bytes = field(repr=False)

    def save(self, folder: Path, stem: str) -> None:
        """Write ``<stem>.crt``, and ``<stem>.key`` for its owner alone; neither may exist yet."""
        folder.mkdir(parents=True, exist_ok=True)
        write_private(folder / f"{stem}.key", self.key)
        with (folder / f"{stem}.crt").open("xb") as file:
            file.write(self.certificate)


@dataclass(frozen=True)
class Authority:
    """The authority, whose certificates everybody in a federation trusts.

    Attributes:
        credential: Its own certificate, which everybody gets, and its key, which nobody gets.
    """

    credential: Credential

    @classmethod
    def create(cls, name: str = "fedcompo CA", days: int = 3650) -> Authority:
        """Make a new authority.

        Args:
            name: Its common name.
            days: How long its certificate is valid; negative: it has expired (for tests).
        """
        key = _new_key()
        subject = _subject(name, "authority")
        builder = (
            _builder(subject, subject, key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
        )
        return cls(_signed(builder, key, key))

    @classmethod
    def load(cls, certificate: Path, key: Path) -> Authority:
        """Read the files that :meth:`save` wrote.

        Raises:
            ConfigError: If a file cannot be read, the certificate is no authority's, or the two do
                not belong together.
        """
        credential = read_credential(certificate, key)
        extensions = x509.load_pem_x509_certificate(credential.certificate).extensions
        try:
            _private_key(credential.key)
            if not extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
                raise ValueError("it is of a server or client")
        except (ValueError, x509.ExtensionNotFound) as error:
            raise ConfigError(f"{certificate}, expected an authority's: {error}.") from error
        return cls(credential)

    def save(self, folder: Path) -> None:
        """Write ``ca.crt``, and ``ca.key`` for its owner alone; neither may exist yet."""
        self.credential.save(folder, AUTHORITY_STEM)

    def issue_server(self, hosts: Sequence[str], *, days: int = 825) -> Credential:
        """Certify a server.

        Args:
            hosts: DNS names and IP addresses under which it is reached.
            days: How long the certificate is valid; negative: it has expired (for tests).

        Raises:
            ConfigError: If there is no host, or one is neither a DNS name nor an IP address.
        """
        if not hosts:
            raise ConfigError("A server's certificate needs a host: a DNS name or an IP address.")
        alternatives = x509.SubjectAlternativeName([check_host(host) for host in hosts])
        subject = _subject(SERVER, SERVER)
        return self._issue(subject, ExtendedKeyUsageOID.SERVER_AUTH, days, alternatives)

    def issue_client(self, name: str, *, operator: bool = False, days: int = 825) -> Credential:
        """Certify a client, or an operator of the server.

        Args:
            name: Becomes the common name.
            operator: Whether it is an operator, who may do more than a client.
            days: How long the certificate is valid; negative: it has expired (for tests).

        Raises:
            ContributionError: If the name cannot be a client's, or is that of a shard.
            ConfigError: If it is longer than a certificate's common name may be.
        """
        check_whole(check_client_name(name))
        if (length := len(name.encode())) > LONGEST_COMMON_NAME:
            raise ConfigError(
                f"{name!r} takes {length} bytes, but the common name of a certificate holds at "
                f"most {LONGEST_COMMON_NAME}. Choose a shorter name."
            )
        subject = _subject(name, OPERATOR if operator else CLIENT)
        return self._issue(subject, ExtendedKeyUsageOID.CLIENT_AUTH, days)

    def _issue(
        self,
        subject: x509.Name,
        purpose: x509.ObjectIdentifier,
        days: int,
        alternatives: x509.SubjectAlternativeName | None = None,
    ) -> Credential:
        own = x509.load_pem_x509_certificate(self.credential.certificate)
        key = _new_key()
        identifier = own.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
        builder = (
            _builder(subject, own.subject, key.public_key(), days)
            .add_extension(issuer, critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        )
        if alternatives:
            builder = builder.add_extension(alternatives, critical=False)
        return _signed(builder, key, _private_key(self.credential.key))


def read_authority(path: Path) -> bytes:
    """Read the certificate of an authority; raises ``ConfigError`` if it is none."""
    try:
        pem = path.read_bytes()
        x509.load_pem_x509_certificates(pem)
    except UNREADABLE as error:
        raise ConfigError(
            f"The authority's certificate {path} cannot be read: {error}. "
            "Name the ca.crt that the authority handed out."
        ) from error
    return pem


def read_credential(certificate: Path, key: Path) -> Credential:
    """Read a certificate and its key; raises ``ConfigError`` if they do not belong together."""
    try:
        pem = certificate.read_bytes()
        public = x509.load_pem_x509_certificate(pem).public_key()
    except UNREADABLE as error:
        raise ConfigError(f"The certificate {certificate} cannot be read: {error}.") from error
    try:
        secret = key.read_bytes()
        private = serialization.load_pem_private_key(secret, password=None)
    except UNREADABLE as error:
        raise ConfigError(
            f"The key {key} cannot be read ({type(error).__name__}); expected a private key in "
            "PEM, without a password."
        ) from error
    if private.public_key() != public:
        raise ConfigError(f"The certificate {certificate} and the key {key} are no pair.")
    return Credential(pem, secret)


def name_in(credential: Credential) -> str:
    """Return the common name in a certificate."""
    subject = x509.load_pem_x509_certificate(credential.certificate).subject
    names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"it holds a {type(key).__name__}, expected a key on an elliptic curve")
    return key


def _subject(name: str, unit: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def check_host(host: str) -> x509.GeneralName:
    """Return a host as certificates name it; raises ``ConfigError`` if it is no host."""
    try:
        if "%" in host:
            raise ValueError("a scope holds on one machine alone, and may be any text")
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        # An address that was mistyped is no DNS name: no top-level domain consists of digits.
        last = host.rstrip(".").rpartition(".")[2]
        if len(host) > 253 or last.isdigit() or not DNS_NAME.fullmatch(host):
            raise ConfigError(
                f"{host!r} is neither a DNS name nor an IP address. Write it without scheme, port, "
                "path, brackets and scope, such as fed.example.org, 192.0.2.7 or 2001:db8::7."
            ) from None
        return x509.DNSName(host.rstrip("."))


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
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    """Begin a certificate with the fields that all certificates have."""
    now = datetime.datetime.now(datetime.UTC)
    ends = now + datetime.timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, ends) - CLOCK_SKEW)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _signed(
    builder: x509.CertificateBuilder,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
) -> Credential:
    """Sign a certificate, and return it with its own private key."""
    certificate = builder.sign(signer, hashes.SHA384())
    return Credential(certificate.public_bytes(serialization.Encoding.PEM), private_pem(key))
