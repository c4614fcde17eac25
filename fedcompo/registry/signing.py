"""Ed25519 signatures of removal records; the cryptography is that of the ``cryptography`` package.

The registry keeps the private key, readable by its owner alone. Who holds only the public key can
check a record, but not make one.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedcompo.errors import FileFormatError
from fedcompo.storage.files import UNREADABLE, private_pem, write_private, write_synced


def create_key(private: Path, public: Path) -> None:
    """Make a key pair and write both halves as PEM; the files must not exist yet."""
    key = Ed25519PrivateKey.generate()
    write_private(private, private_pem(key))
    write_synced(public, _public_pem(key.public_key()), mode="xb")


def sign(message: bytes, private: Path) -> str:
    """Sign a message; returns 64 bytes in hexadecimal.

    Raises:
        FileFormatError: If the key cannot be read.
    """
    return _read_private(private).sign(message).hex()


def is_signed(message: bytes, signature: str, public: Path) -> bool:
    """Whether the signature is that of the message under this public key.

    Raises:
        FileFormatError: If the key cannot be read.
    """
    key = _read_public(public)
    try:
        value = bytes.fromhex(signature)
        key.verify(value, message)
    except (InvalidSignature, ValueError):
        return False
    return value.hex() == signature  # capitals and spaces are read as the same bytes


def check_pair(private: Path, public: Path) -> None:
    """Refuse keys that do not belong together, or are not written as :func:`create_key` does.

    Raises:
        FileFormatError: Naming the file.
    """
    key, known = _read_private(private), _read_public(public)
    if private.read_bytes() != private_pem(key):
        raise FileFormatError(f"The private key {private} was altered.")
    if public.read_bytes() != _public_pem(known):
        raise FileFormatError(f"The public key {public} was altered.")
    if _public_pem(key.public_key()) != _public_pem(known):
        raise FileFormatError(f"The keys {private} and {public} do not belong together.")


def _read_private(path: Path) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except UNREADABLE as error:
        raise FileFormatError(f"The private key {path} cannot be read: {error}.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise FileFormatError(f"{path} holds a {type(key).__name__}, expected an Ed25519 key.")
    return key


def _read_public(path: Path) -> Ed25519PublicKey:
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except UNREADABLE as error:
        raise FileFormatError(f"The public key {path} cannot be read: {error}.") from error
    if not isinstance(key, Ed25519PublicKey):
        raise FileFormatError(f"{path} holds a {type(key).__name__}, expected an Ed25519 key.")
    return key


def _public_pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
