"""Certificates and keys: who holds one, what it may be, and reading them from files.

A certificate says who its holder is (common name) and what it may be (organizational unit:
``server``, ``client`` or ``operator``). Files are checked when they are read: gRPC takes anything
for a certificate, and then fails to connect without saying why.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import NameOID

from fedcompo.data.tasks import check_whole
from fedcompo.errors import ConfigError
from fedcompo.names import check_client_name
from fedcompo.storage.files import UNREADABLE, tuples, write_atomically, write_private

SERVER, CLIENT, OPERATOR = "server", "client", "operator"
"""Organizational units: the role of a certificate's holder."""

HOLDER = "holder.json"
"""File beside keys: who holds them."""
ORGANIZATION = "fedcompo"
LONGEST_COMMON_NAME = 64
"""Bytes; X.509 allows no more."""
DNS_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?", re.ASCII)


@dataclass(frozen=True)
class Holder:
    """Who a certificate is for.

    Attributes:
        name: Common name.
        role: Organizational unit: ``server``, ``client`` or ``operator``.
        hosts: DNS names and IP addresses under which a server is reached; nobody else has any.

    Raises:
        ContributionError: If the name cannot be a client's, or is that of a shard.
        ConfigError: If it is longer than a certificate's common name may be; if a server has no
            host, or one is neither a DNS name nor an IP address.
    """

    name: str
    role: str = CLIENT
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the name and the hosts."""
        if self.role not in (SERVER, CLIENT, OPERATOR) or (self.hosts and self.role != SERVER):
            raise ConfigError(f"{self.role!r} with the hosts {self.hosts} is no role of a holder.")
        if self.role == SERVER and not self.hosts:
            raise ConfigError("A server's certificate needs a host: a DNS name or an IP address.")
        check_whole(check_client_name(self.name))
        if (length := len(self.name.encode())) > LONGEST_COMMON_NAME:
            raise ConfigError(
                f"{self.name!r} takes {length} bytes, but the common name of a certificate holds "
                f"at most {LONGEST_COMMON_NAME}. Choose a shorter name."
            )

    @classmethod
    def server(cls, hosts: Iterable[str]) -> Holder:
        """A server that is reached under these hosts."""
        named = (str(check_host(host).value) for host in hosts)
        return cls(SERVER, SERVER, tuple(dict.fromkeys(named)))

    @classmethod
    def of(cls, signed: x509.Certificate | x509.CertificateSigningRequest) -> Holder:
        """Read the holder of a certificate, or of a request for one.

        Raises:
            ValueError: If it names nobody as this library does.
        """
        role, names = common_name(signed, NameOID.ORGANIZATIONAL_UNIT_NAME), None
        with suppress(x509.ExtensionNotFound):
            names = signed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        holder = cls(common_name(signed), role, tuple(str(name.value) for name in names or ()))
        if signed.subject != holder.subject or names != holder.alternatives:
            raise ValueError(f"it is of {signed.subject.rfc4514_string()!r}, not as fedcompo names")
        return holder

    @classmethod
    def load(cls, folder: Path) -> Holder:
        """Read what :meth:`save` wrote; raises ``ConfigError`` if there is nothing of the kind."""
        file = folder / HOLDER
        try:
            return cls(**tuples(json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{file} does not say for whom the keys are ({error}). Stand in the folder of a "
                "client or of the server, or name them by --name or --host."
            ) from error

    def save(self, folder: Path) -> None:
        """Write ``holder.json``."""
        write_atomically(folder / HOLDER, f"{json.dumps(asdict(self))}\n".encode())

    @property
    def subject(self) -> x509.Name:
        """Its name in a certificate."""
        return subject_of(self.name, self.role)

    @property
    def alternatives(self) -> x509.SubjectAlternativeName | None:
        """Its hosts in a certificate; None without."""
        hosts = [check_host(host) for host in self.hosts]
        return x509.SubjectAlternativeName(hosts) if hosts else None

    def __str__(self) -> str:
        """Name, role and hosts, for messages."""
        hosts = f" for {', '.join(self.hosts)}" if self.hosts else ""
        return f"{self.role} {self.name}{hosts}" if self.role == CLIENT else f"{self.role}{hosts}"


@dataclass(frozen=True)
class Credential:
    """A certificate and its private key, both in PEM."""

    certificate: bytes
    key: bytes = field(repr=False)

    @property
    def parsed(self) -> x509.Certificate:
        """The certificate, parsed."""
        return x509.load_pem_x509_certificate(self.certificate)

    def save(self, folder: Path, stem: str) -> None:
        """Write ``<stem>.crt``, and ``<stem>.key`` for its owner alone; neither may exist yet."""
        folder.mkdir(parents=True, exist_ok=True)
        write_private(folder / f"{stem}.key", self.key)
        with (folder / f"{stem}.crt").open("xb") as file:
            file.write(self.certificate)


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


def read_certificate(path: Path) -> x509.Certificate:
    """Read a certificate; raises ``ConfigError`` if it is none."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except UNREADABLE as error:
        raise ConfigError(f"The certificate {path} cannot be read: {error}.") from error


def read_credential(certificate: Path, key: Path) -> Credential:
    """Read a certificate and its key; raises ``ConfigError`` if they do not belong together."""
    public = read_certificate(certificate).public_key()
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
    return Credential(certificate.read_bytes(), secret)


def common_name(
    signed: x509.Certificate | x509.CertificateSigningRequest,
    kind: x509.ObjectIdentifier = NameOID.COMMON_NAME,
) -> str:
    """Return the common name, or another part of the subject; empty if it has none."""
    names = signed.subject.get_attributes_for_oid(kind)
    return str(names[0].value) if names else ""


def subject_of(name: str, unit: str) -> x509.Name:
    """Return a subject of a name and an organizational unit."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def new_key() -> ec.EllipticCurvePrivateKey:
    """Make a private key on the curve P-384."""
    return ec.generate_private_key(ec.SECP384R1())


def key_digest(key: CertificatePublicKeyTypes) -> str:
    """SHA-256 of a public key's DER form (SubjectPublicKeyInfo), hexadecimal."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()


def check_host(host: str) -> x509.DNSName | x509.IPAddress:
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
