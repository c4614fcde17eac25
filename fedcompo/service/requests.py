"""Requests for certificates (PKCS#10): how a key that never leaves its machine gets certified.

The holder makes its keys where it uses them, and sends a request: name, role, hosts and public
keys, signed with the TLS key. A client's request holds the public key of its SuperNode too, in an
extension; one signature covers everything. What it cannot prove is whose it is: two people compare
the fingerprint over another channel, such as the telephone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedcompo.errors import ConfigError
from fedcompo.service.certificates import CLIENT, Holder, new_key
from fedcompo.storage.files import (
    OWNER_ONLY,
    UNREADABLE,
    replaced,
    write_atomically,
    write_private,
)

NODE_KEY = "supernode"
"""File of the key by which the SuperLink knows a client."""
NODE_KEY_EXTENSION = x509.ObjectIdentifier("2.25.191502135781840966194943153973096242523")
"""Holds a node's public key, as OpenSSH writes it. An identifier below 2.25 belongs to its UUID."""
CURVE = "secp384r1"
SUFFIX = ".request"
MALFORMED = (x509.DuplicateExtension, x509.InvalidVersion, x509.UnsupportedGeneralNameType)


@dataclass(frozen=True)
class Request:
    """A request for a certificate, whose signature holds.

    Attributes:
        holder: Who asks.
        key: Its public key for TLS.
        node_key: A client's public key for the SuperLink, as OpenSSH writes it; else empty.
        pem: The request itself.
    """

    holder: Holder
    key: ec.EllipticCurvePublicKey
    node_key: bytes
    pem: bytes

    @classmethod
    def make(cls, holder: Holder, key: ec.EllipticCurvePrivateKey, node_key: bytes) -> Request:
        """Ask for a certificate for a key."""
        builder = x509.CertificateSigningRequestBuilder().subject_name(holder.subject)
        if hosts := holder.alternatives:
            builder = builder.add_extension(hosts, critical=False)
        if node_key:
            extension = x509.UnrecognizedExtension(NODE_KEY_EXTENSION, node_key)
            builder = builder.add_extension(extension, critical=False)
        return cls._of(builder.sign(key, hashes.SHA384()))

    @classmethod
    def read(cls, path: Path) -> Request:
        """Read a request, and check its signature and its keys.

        Raises:
            ConfigError: If it is none, was altered, or asks with a key of another kind.
        """
        try:
            return cls._of(x509.load_pem_x509_csr(path.read_bytes()))
        except (*UNREADABLE, *MALFORMED) as error:  # our own are ValueErrors, too
            raise ConfigError(
                f"{path} is no request that can be approved: {error}. Ask its sender for a new "
                "one, made by `fedcompo request-certificate`."
            ) from error

    @classmethod
    def _of(cls, request: x509.CertificateSigningRequest) -> Request:
        if not request.is_signature_valid:
            raise ValueError("its signature is not of its key; it was altered on its way")
        holder, node_key = Holder.of(request), b""
        for extension in request.extensions:
            value = extension.value
            if isinstance(value, x509.UnrecognizedExtension) and value.oid == NODE_KEY_EXTENSION:
                node_key = _openssh(required_key(serialization.load_ssh_public_key(value.value)))
            elif not isinstance(value, x509.SubjectAlternativeName):
                raise ValueError(f"it asks for {extension.oid.dotted_string}, which nobody gets")
        if (holder.role == CLIENT) != bool(node_key):
            raise ValueError("clients, and they alone, send a key for the SuperLink")
        key = required_key(request.public_key())
        return cls(holder, key, node_key, request.public_bytes(serialization.Encoding.PEM))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the file, as `sha256sum` prints it, in groups of four to read aloud."""
        digits = hashlib.sha256(self.pem).hexdigest()
        return " ".join(digits[start : start + 4] for start in range(0, len(digits), 4))


def prepare(folder: Path, holder: Holder) -> Request:
    """Make a holder's private keys in a folder, for their owner alone, and ask for a certificate.

    Keys that lie there already are kept: the request is for them then.

    Args:
        folder: Gets ``<role>.key`` and, for a client, ``supernode``.
        holder: Who asks.

    Raises:
        ConfigError: If a key lies there that cannot be used.
    """
    key = _kept(folder / f"{holder.role}.key")
    node_key = b""
    if holder.role == CLIENT:
        node_key = _openssh(_kept(folder / NODE_KEY, openssh=True).public_key())
    return Request.make(holder, key, node_key)


def save(request: Request, folder: Path) -> Path:
    """Write the file to send, in place of an earlier one; returns its path."""
    path = folder / f"{request.holder.name}{SUFFIX}"
    write_atomically(path, request.pem)
    return path


def _kept(path: Path, *, openssh: bool = False) -> ec.EllipticCurvePrivateKey:
    """Read a private key; where there is no file, make one."""
    if not path.exists():
        key, pem = new_key(), serialization.Encoding.PEM
        form = serialization.PrivateFormat.OpenSSH if openssh else serialization.PrivateFormat.PKCS8
        with replaced(path) as temporary:
            write_private(temporary, key.private_bytes(pem, form, serialization.NoEncryption()))
        return key
    load = serialization.load_ssh_private_key if openssh else serialization.load_pem_private_key
    try:
        if path.stat().st_mode & 0o077:
            raise ValueError(f"others may read it; run: chmod {OWNER_ONLY:o} {path}")
        found = load(path.read_bytes(), password=None)
        required_key(found.public_key())
        assert isinstance(found, ec.EllipticCurvePrivateKey)
    except UNREADABLE as error:
        raise ConfigError(
            f"The key {path} cannot be used: {error}. Nothing was changed; name a new folder "
            "with -o, or move the key away."
        ) from error
    return found


def _openssh(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def required_key(key: object) -> ec.EllipticCurvePublicKey:
    """Return a public key if it lies on the curve P-384; else raise ``ValueError``."""
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != CURVE:
        kind = key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else type(key).__name__
        raise ValueError(f"it holds a key of the kind {kind}, expected {CURVE}")
    return key
