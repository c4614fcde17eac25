"""Certificates and keys in files, read and held against each other before they are used.

gRPC takes anything for a certificate, and then fails to connect without saying why.
"""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import NameOID

from fedcompo.errors import ConfigError
from fedcompo.service.certificates import UNREADABLE, Credential


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
    """Whom a certificate names."""
    subject = x509.load_pem_x509_certificate(credential.certificate).subject
    names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""
