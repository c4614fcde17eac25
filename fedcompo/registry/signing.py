"""Ed25519 signatures in a registry's name; the arithmetic is the ``cryptography`` package's.

The private key lies in the registry, or outside of it, perhaps encrypted. Who holds only the public
key can check a signature, but not make one. A key is known by its *fingerprint*: the SHA-256 of the
public key's DER form (SubjectPublicKeyInfo), as ``openssl pkey -pubin -outform DER`` writes it.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import sys
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedcompo.errors import ConfigError, FileFormatError
from fedcompo.storage.files import UNREADABLE, private_pem, write_private

PRIVATE, PUBLIC = "key.pem", "public.pem"
"""Files of a registry."""
KEY, PASSWORD = "FEDCOMPO_SIGNING_KEY", "FEDCOMPO_SIGNING_PASSWORD"
"""Variables of the environment: the file of the private key, and its password."""


@dataclass(frozen=True)
class Signer:
    """A private key that signs in a registry's name."""

    key: Ed25519PrivateKey
    password: str = field(default="", repr=False)
    """That of its file; empty: the file is not encrypted."""

    def sign(self, message: bytes) -> bytes:
        """Sign a message; returns 64 bytes."""
        return self.key.sign(message)

    @cached_property
    def public_pem(self) -> bytes:
        """The public key, PEM."""
        return self.key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    @property
    def fingerprint(self) -> str:
        """The key's fingerprint, 64 hexadecimal digits."""
        return fingerprint_of(self.public_pem)


def place_of_key(registry: Path, key: Path | None = None) -> Path:
    """Where a registry's private key lies: as named, as the environment says, or in the registry.

    Args:
        registry: Folder of the registry.
        key: File of the key; None: ``FEDCOMPO_SIGNING_KEY``, else the registry's own.
    """
    return key or Path(os.environ.get(KEY) or registry / PRIVATE)


def signer_for(registry: Path, key: Path | None = None) -> Signer:
    """Open the private key of a registry; see :func:`place_of_key` for where it lies.

    Raises:
        ConfigError: If there is no key, it is another's, or its password is missing.
        FileFormatError: If the key cannot be read, or the password is wrong.
    """
    place = place_of_key(registry, key)
    if not place.exists():
        raise ConfigError(
            f"There is no signing key at {place}, and this change of {registry} must be signed. "
            f"Name the registry's private key by `--signing-key FILE` or {KEY}."
        )
    signer = read_signer(place)
    require_own(signer, registry)
    return signer


def require_own(signer: Signer, registry: Path) -> None:
    """Raise ``ConfigError`` unless a private key belongs to the registry's public key."""
    if signer.fingerprint != (own := fingerprint_of((registry / PUBLIC).read_bytes())):
        raise ConfigError(
            f"The signing key is not that of {registry}: it has the fingerprint "
            f"{signer.fingerprint}, expected {own}. Name the private key that belongs to {PUBLIC}; "
            "was it changed meanwhile?"
        )


def read_or_create(place: Path, password: str = "") -> Signer:
    """Read a private key, or make it if it is not there; see :func:`create_key`."""
    return read_signer(place) if place.exists() else create_key(place, password)


def create_key(place: Path, password: str = "") -> Signer:
    """Make a key and write it as PEM, for its owner alone; the file must not exist yet.

    Args:
        place: The file.
        password: To encrypt it; empty: ``FEDCOMPO_SIGNING_PASSWORD``, else it is not encrypted.
    """
    signer = Signer(Ed25519PrivateKey.generate(), password or os.environ.get(PASSWORD, ""))
    place.parent.mkdir(parents=True, exist_ok=True)
    write_private(place, private_pem(signer.key, signer.password))
    return signer


def read_signer(place: Path) -> Signer:
    """Read a private key; an encrypted one's password comes from the environment, or is asked for.

    Raises:
        ConfigError: If it is encrypted, and there is neither password nor terminal.
        FileFormatError: If it cannot be read.
    """
    try:
        data = place.read_bytes()
        password = (os.environ.get(PASSWORD) or _asked(place)) if _is_encrypted(data) else ""
        key = serialization.load_pem_private_key(data, password.encode() or None)
    except ConfigError:
        raise
    except UNREADABLE as error:
        raise FileFormatError(
            f"The private key {place} cannot be read: {error}. If it is encrypted, check the "
            f"password ({PASSWORD})."
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise FileFormatError(f"{place} holds a {type(key).__name__}, expected an Ed25519 key.")
    return Signer(key, password)


def check_pair(private: Path, public: Path) -> None:
    """Refuse keys that do not belong together, or are not written as this fedcompo writes them.

    Raises:
        ConfigError: If the private key is encrypted, and there is neither password nor terminal.
        FileFormatError: Naming the file.
    """
    signer, known = read_signer(private), public.read_bytes()
    if private_pem(signer.key) != (data := private.read_bytes()) and not _is_encrypted(data):
        raise FileFormatError(f"The private key {private} was altered.")
    if signer.public_pem != known:
        raise FileFormatError(f"The keys {private} and {public} do not belong together.")


def is_signed(message: bytes, signature: str, public_pem: bytes) -> bool:
    """Whether a signature, in hexadecimal, is that of the message under this public key.

    Raises:
        FileFormatError: If the key cannot be read.
    """
    key = _public(public_pem)
    try:
        value = bytes.fromhex(signature)
        key.verify(value, message)
    except (InvalidSignature, ValueError):
        return False
    return value.hex() == signature  # capitals and spaces are read as the same bytes


def fingerprint_of(public_pem: bytes) -> str:
    """Fingerprint of a public key, 64 hexadecimal digits.

    Raises:
        FileFormatError: If it is no Ed25519 key.
    """
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    der = _public(public_pem).public_bytes(serialization.Encoding.DER, form)
    return hashlib.sha256(der).hexdigest()


def _public(pem: bytes) -> Ed25519PublicKey:
    try:
        key = serialization.load_pem_public_key(pem)
    except UNREADABLE as error:
        raise FileFormatError(f"The public key cannot be read: {error}.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise FileFormatError(f"There is a {type(key).__name__}, expected an Ed25519 key.")
    return key


def is_locked(private: Path) -> bool:
    """Whether a private key is encrypted, and the environment has no password."""
    return _is_encrypted(private.read_bytes()) and not os.environ.get(PASSWORD)


def _is_encrypted(pem: bytes) -> bool:
    return b"ENCRYPTED" in pem


@cache
def _asked(place: Path) -> str:
    """Ask for a password once, however often a command signs."""
    if not sys.stdin.isatty():
        raise ConfigError(f"The private key {place} is encrypted. Set {PASSWORD}.")
    return getpass.getpass(f"Password of {place}: ")
