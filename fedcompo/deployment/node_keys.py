"""The key pair by which Flower's SuperLink knows a client: P-384, in OpenSSH's format."""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


@dataclass(frozen=True)
class NodeKey:
    """A key pair, both halves in OpenSSH's format."""

    public: bytes
    private: bytes = field(repr=False)

    @classmethod
    def create(cls, name: str) -> NodeKey:
        """Make a new pair.

        Args:
            name: Whose it is; becomes the comment of the public key.
        """
        key = ec.generate_private_key(ec.SECP384R1())
        public = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        return cls(public + f" {name}\n".encode(), private)
