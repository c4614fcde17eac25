"""Envelopes: another's verifier accepts ours and refuses what was altered, and so do we."""

from __future__ import annotations

import base64
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from securesystemslib.dsse import Envelope as TheirEnvelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey

from fedcompo.errors import FileFormatError
from fedcompo.registry.envelope import Envelope, opened, sealed, statement_of
from fedcompo.registry.signing import Signer

KIND = "https://fedcompo.org/removal/v1"
STATEMENT = statement_of(KIND, {"model.safetensors": "ab" * 32}, {"client": "b", "λ": 0.25})


@pytest.fixture
def pen():
    return another()


def another() -> Signer:
    return Signer(Ed25519PrivateKey.generate())


def accepted_by_securesystemslib(data: bytes, signer, keyid: str = "") -> bool:
    public = load_pem_public_key(signer.public_pem)
    key = SSlibKey.from_crypto(public, keyid or signer.fingerprint)
    try:
        TheirEnvelope.from_dict(json.loads(data)).verify([key], 1)
    except VerificationError:
        return False
    return True


def altered(data: bytes, **changes) -> bytes:
    """Lie in the payload or elsewhere in the envelope, and write it as ours are written."""
    values = json.loads(data)
    payload = {**json.loads(base64.b64decode(values["payload"])), **changes.pop("payload", {})}
    text = json.dumps(payload, sort_keys=True, separators=(",", ":")).encode()
    values = {**values, "payload": base64.b64encode(text).decode(), **changes}
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def test_securesystemslib_accepts_ours_and_refuses_an_altered_one(pen):
    data = sealed(STATEMENT, pen)
    assert accepted_by_securesystemslib(data, pen)
    assert altered(data) == data
    assert not accepted_by_securesystemslib(
        data, another(), pen.fingerprint
    )  # another key of the same name
    lie = altered(data, payload={"predicate": {"client": "c", "λ": 0.25}})
    assert not accepted_by_securesystemslib(lie, pen)
    assert not accepted_by_securesystemslib(altered(data, payloadType="text/plain"), pen)


def test_we_accept_what_is_signed_by_the_key_and_nothing_else(pen):
    data = sealed(STATEMENT, pen)
    envelope = opened(data, source="it")
    assert envelope.statement == STATEMENT
    assert envelope.keyid == pen.fingerprint
    assert envelope.is_signed_by(pen.public_pem)
    assert not envelope.is_signed_by(another().public_pem)
    lie = altered(data, payload={"predicate": {"client": "c", "λ": 0.25}})
    assert not opened(lie, source="it").is_signed_by(pen.public_pem)
    without = Envelope(envelope.payload, (("", b""),))
    assert not without.is_signed_by(pen.public_pem)
    both = Envelope(envelope.payload, (("x", b"\0" * 64), *envelope.signatures))
    assert opened(both.data, source="it").is_signed_by(pen.public_pem)
    with pytest.raises(FileFormatError, match="public key"):
        envelope.is_signed_by(b"no key")


def test_every_changed_byte_is_refused(pen):
    data = sealed(STATEMENT, pen)
    for position in range(len(data)):
        lie = bytearray(data)
        lie[position] ^= 1
        try:
            envelope = opened(bytes(lie), source="it")
        except FileFormatError:
            continue
        assert envelope.keyid != pen.fingerprint or not envelope.is_signed_by(pen.public_pem)


@pytest.mark.parametrize(
    "lie",
    [
        {"payload": {"_type": "https://in-toto.io/Statement/v0.1"}},
        {"payload": {"subject": []}},
        {"payload": {"subject": [{"name": "a", "digest": {"sha512": "00"}}]}},
        {"payload": {"subject": "all"}},
        {"payload": {"predicate": None}},
        {"payload": {"more": 1}},
        {"payloadType": "text/plain"},
        {"signatures": []},
        {"signatures": [{"keyid": "a", "sig": "="}]},
        {"signatures": [{"keyid": "a", "sig": "AA=="}, 3]},
        {"more": 1},
    ],
)
def test_what_is_no_statement_is_refused(lie, pen):
    with pytest.raises(FileFormatError, match="altered"):
        opened(altered(sealed(STATEMENT, pen), **lie), source="it")


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"payload":3}'])
def test_what_is_no_envelope_is_refused(data):
    with pytest.raises(FileFormatError, match="A letter is"):
        opened(data, source="A letter")
