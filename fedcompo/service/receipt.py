"""What a client keeps of its removal: the signed record, and the key that checks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedcompo.errors import ServiceError
from fedcompo.registry.known import Known
from fedcompo.registry.signing import fingerprint_of, is_signed

if TYPE_CHECKING:
    from fedcompo.registry.removal import RemovalRecord


@dataclass(frozen=True)
class Receipt:
    """Proof of a removal, for the client that has left."""

    record: bytes
    """A removal record, signed."""
    public_key: bytes
    """The key that checks its signature, PEM."""
    known: Known | None = None
    """What this machine knows of the registry; None: the connection does not insist on it."""

    def checked(self, client: str) -> RemovalRecord:
        """Read the record; raises ``ServiceError`` unless it is this client's, and signed."""
        from fedcompo.registry.removal import RemovalRecord

        record = RemovalRecord.parse(self.record, source="The receipt")
        signed = is_signed(record.signed_bytes, record.signature, self.public_key)
        if record.client != client or not signed:
            raise ServiceError(
                f"The server's receipt is of {record.client!r} and {'' if signed else 'not '}"
                f"signed by its key; expected a signed one of {client!r}. Keep it, and ask an "
                "operator."
            )
        key = fingerprint_of(self.public_key)
        if self.known and not self.known.signs(key, record.sequence):
            raise ServiceError(
                f"The receipt is signed by the key SHA-256 {key}, expected the one that is pinned, "
                f"{self.known.fingerprint}. Keep it, and ask an operator."
            )
        return record

    def require_in(self, there: Any) -> None:
        """Raise ``ServiceError`` unless the registry, a ``ListReply``, has had this removal."""
        from fedcompo.registry.removal import RemovalRecord

        record = RemovalRecord.parse(self.record, source="The receipt")
        now, then = (there.sequence, there.root), (record.sequence, record.root_after)
        stayed = any(m.client == record.client and m.added < then[0] for m in there.members)
        if stayed or now[0] < then[0] or (now[0] == then[0] and now != then):
            raise ServiceError(
                f"The registry has root and line {now[1]}@{now[0]}; expected {then[1]}@{then[0]}, "
                f"which the receipt states, or a later line, without {record.client}: the removal "
                "is not in it, or was taken back. Keep the receipt, and ask an operator."
            )
