"""Keys and signatures: who holds the private half can sign, everyone else can only check."""

from __future__ import annotations

import os
import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from registry_builders import overwrite

from fedcompo.errors import FileFormatError
from fedcompo.registry import signing

MESSAGE = b"who, when, why"


@pytest.fixture
def keys(tmp_path):
    (tmp_path / "public.pem").write_bytes(signing.create_key(tmp_path / "key.pem").public_pem)
    return tmp_path / "key.pem", tmp_path / "public.pem"


def test_a_signature_holds_under_the_public_key_alone(keys):
    private, public = keys
    signature = signing.read_signer(private).sign(MESSAGE).hex()
    private.unlink()
    assert signing.is_signed(MESSAGE, signature, public.read_bytes())


def test_it_is_plain_ed25519_that_others_can_check(keys):
    private, public = keys
    key = serialization.load_pem_public_key(public.read_bytes())
    assert isinstance(key, Ed25519PublicKey)
    key.verify(
        bytes.fromhex(signing.read_signer(private).sign(MESSAGE).hex()), MESSAGE
    )  # raises if it is not


def test_any_changed_bit_of_message_or_signature_is_refused(keys):
    private, public = keys
    signature = signing.read_signer(private).sign(MESSAGE).hex()
    for position in range(len(MESSAGE) * 8):
        other = bytearray(MESSAGE)
        other[position // 8] ^= 1 << position % 8
        assert not signing.is_signed(bytes(other), signature, public.read_bytes())
    for position in range(len(signature) * 8):
        data = bytearray(signature.encode())
        data[position // 8] ^= 1 << position % 8
        assert not signing.is_signed(MESSAGE, data.decode("latin-1"), public.read_bytes())


@pytest.mark.parametrize("change", [str.upper, lambda s: f" {s}", lambda s: s + "00", lambda s: ""])
def test_a_signature_is_written_in_one_way_only(change, keys):
    private, public = keys
    signature = signing.read_signer(private).sign(MESSAGE).hex()
    assert change(signature) != signature
    assert not signing.is_signed(MESSAGE, change(signature), public.read_bytes())


def test_another_key_does_not_do(keys, tmp_path):
    (tmp_path / "other-public.pem").write_bytes(
        signing.create_key(tmp_path / "other.pem").public_pem
    )
    signature = signing.read_signer(tmp_path / "other.pem").sign(MESSAGE).hex()
    assert not signing.is_signed(MESSAGE, signature, keys[1].read_bytes())
    with pytest.raises(FileFormatError, match="do not belong together"):
        signing.check_pair(tmp_path / "other.pem", keys[1])


def test_the_private_key_is_for_its_owner_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        (tmp_path / "public.pem").write_bytes(signing.create_key(tmp_path / "key.pem").public_pem)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600


def test_a_key_is_never_overwritten(tmp_path):
    (tmp_path / "key.pem").write_text("precious")
    with pytest.raises(FileExistsError):
        signing.create_key(tmp_path / "key.pem")
    assert (tmp_path / "key.pem").read_text() == "precious"


def test_every_altered_byte_of_either_key_is_found(keys):
    signing.check_pair(*keys)
    for path in keys:
        data = path.read_bytes()
        for position in range(len(data)):
            altered = bytearray(data)
            altered[position] ^= 1
            overwrite(path, altered)
            with pytest.raises(FileFormatError, match=path.name):
                signing.check_pair(*keys)
        overwrite(path, data)
    signing.check_pair(*keys)


def test_missing_and_foreign_keys_are_named(keys, tmp_path):
    private, public = keys
    with pytest.raises(FileFormatError, match=r"nowhere\.pem cannot be read"):
        signing.read_signer(tmp_path / "nowhere.pem")
    with pytest.raises(FileFormatError, match="cannot be read"):
        signing.is_signed(MESSAGE, "", private.read_bytes())  # a private key is no public one
    foreign = ec.generate_private_key(ec.SECP256R1())
    private.write_bytes(
        foreign.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    with pytest.raises(FileFormatError, match="expected an Ed25519 key"):
        signing.read_signer(private)
    public.write_bytes(
        foreign.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    with pytest.raises(FileFormatError, match="expected an Ed25519 key"):
        signing.is_signed(MESSAGE, "", public.read_bytes())
