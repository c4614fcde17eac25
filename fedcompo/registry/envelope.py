"""Signed statements as others can read them: an in-toto Statement v1 in a DSSE envelope.

The signature covers ``DSSEv1 <length> <type> <length> <payload>``, so a payload cannot be taken for
one of another type. Formats: github.com/in-toto/attestation (``spec/v1``) and
github.com/secure-systems-lab/dsse (``envelope.md``, ``protocol.md``).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fedcompo.errors import FileFormatError
from fedcompo.registry.signing import Signer, is_signed
from fedcompo.storage.files import canonical
from fedcompo.storage.identity import HEADER

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""Errors of reading a statement from what is none."""


@dataclass(frozen=True)
class Envelope:
    """A statement and who signed it."""

    payload: bytes
    """The statement, canonical JSON."""
    signatures: tuple[tuple[str, bytes], ...]
    """Of each signer the key's identifier, which proves nothing, and the signature."""

    @cached_property
    def statement(self) -> dict[str, Any]:
        """``_type``, ``subject``, ``predicateType`` and ``predicate``."""
        return dict(json.loads(self.payload))

    @property
    def keyid(self) -> str:
        """Fingerprint of the first signer's public key, as the envelope claims it."""
        return self.signatures[0][0]

    @property
    def data(self) -> bytes:
        """The envelope as a file: one line of JSON."""
        signed = [{"keyid": k, "sig": base64.b64encode(s).decode()} for k, s in self.signatures]
        payload = base64.b64encode(self.payload).decode()
        values = {"payload": payload, "payloadType": PAYLOAD_TYPE, "signatures": signed}
        return f"{canonical(values)}\n".encode()

    @property
    def signed_bytes(self) -> bytes:
        """DSSE's pre-authentication encoding, which signatures cover."""
        kind = PAYLOAD_TYPE.encode()
        return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(self.payload), self.payload)

    def is_signed_by(self, public_pem: bytes) -> bool:
        """Whether one of the signatures is that of a key.

        Args:
            public_pem: An Ed25519 public key.

        Raises:
            FileFormatError: If it is no such key.
        """
        message = self.signed_bytes
        return any(is_signed(message, own.hex(), public_pem) for _, own in self.signatures)


def statement_of(
    predicate_type: str, subject: Mapping[str, str], predicate: Mapping[str, Any]
) -> dict[str, Any]:
    """Make a statement about files or other things, given by name with their SHA-256.

    One that is marked, as of a file's header, is under its mark: other tools do not know it.
    """
    parts = {name: digest.rpartition(":") for name, digest in sorted(subject.items())}
    files = [{"name": name, "digest": {p[0] or "sha256": p[2]}} for name, p in parts.items()]
    return {
        "_type": STATEMENT_TYPE,
        "subject": files,
        "predicateType": predicate_type,
        "predicate": dict(predicate),
    }


def sealed(statement: Mapping[str, Any], *signers: Signer) -> bytes:
    """Sign what :func:`statement_of` made, by one key or several; :func:`opened` reads it."""
    unsigned = Envelope(canonical(statement).encode(), ())
    signed = tuple((own.fingerprint, own.sign(unsigned.signed_bytes)) for own in signers)
    return replace(unsigned, signatures=signed).data


def opened(data: bytes, *, source: str) -> Envelope:
    """Read an envelope; whose signatures it bears is not checked yet.

    Args:
        data: What :func:`sealed` returned.
        source: Where it comes from, for the error.

    Raises:
        FileFormatError: If it is not exactly what this fedcompo writes.
    """
    try:
        values = json.loads(data.decode())
        payload = base64.b64decode(values["payload"], validate=True)
        signed = [(one["keyid"], base64.b64decode(one["sig"])) for one in values["signatures"]]
        envelope = Envelope(payload, tuple(signed))
        statement = envelope.statement
        subject = {one["name"]: _marked(**one["digest"]) for one in statement["subject"]}
        again = statement_of(statement["predicateType"], subject, statement["predicate"])
        intact = canonical(again).encode() == payload and envelope.data == data
        intact = intact and bool(signed and subject)
    except MALFORMED as error:
        raise FileFormatError(
            f"{source} is no signed statement ({type(error).__name__}: {error}). "
            "It was altered, or is something else."
        ) from error
    if not intact:
        raise FileFormatError(
            f"{source} is not written as a signed statement is: it was altered, or another "
            "program wrote it."
        )
    return envelope


def _marked(sha256: str = "", header: str = "") -> str:
    """Put a digest's mark before it again."""
    return sha256 or HEADER + header
