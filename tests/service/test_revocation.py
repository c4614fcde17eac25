"""Certificates that were revoked: refused at once, without a restart, whatever holds them."""

from __future__ import annotations

import logging
import os
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from registry_builders import three_clients
from service_runs import authority, client_of, credential, served

from fedcompo.errors import ConfigError, ServiceError
from fedcompo.service.access import Revoked, _read_certificate
from fedcompo.service.certificates import Holder, key_digest


def settle(file: Path) -> None:
    """Let a list be older than it is."""
    os.utime(file, (time.time() - 10, time.time() - 10))


def fingerprint(name: str) -> str:
    certificate = x509.load_pem_x509_certificate(credential(name).certificate)
    return certificate.fingerprint(hashes.SHA256()).hex()


def test_a_certificate_is_revoked_and_let_in_again_while_the_service_runs(tmp_path: Path) -> None:
    revoked = tmp_path / "revoked"
    revoked.write_text("# lost keys\n")
    with (
        served(three_clients(tmp_path / "registry"), revoked=revoked) as address,
        client_of(address, "ben", attempts=1) as ben,
        client_of(address, "ada", attempts=1) as ada,
    ):
        assert len(ben.list().members) == 3
        revoked.write_text(f"{fingerprint('ben')}  # stolen with his laptop\n")
        for call in (ben.list, ben.verify, ben.remove, lambda: ben.fetch(tmp_path / "out")):
            with pytest.raises(ServiceError, match="certificate of ben was revoked"):
                call()
        assert len(ada.list().members) == 3
        revoked.write_text("")
        with pytest.raises(ServiceError, match="was revoked"):
            ben.list()  # it may be empty because somebody is writing it
        settle(revoked)
        assert len(ben.list().members) == 3


def test_a_certificate_is_locked_out_alone_and_a_key_with_all_its_certificates(
    tmp_path: Path,
) -> None:
    """A thief has the key, and every certificate of it; its owner may come back with another."""
    file, stolen = tmp_path / "revoked", credential("ben")
    key = stolen.parsed.public_key()
    renewed = authority().certify(Holder("ben"), key)
    new = authority().issue_client("ben").certificate
    for line, refused in ((fingerprint("ben"), 1), (key_digest(key), 2)):
        file.write_text(line)
        for place, pem in enumerate((stolen.certificate, renewed, new)):
            out = pytest.raises(ServiceError, match="was revoked")
            with out if place < refused else nullcontext():
                Revoked(file).require_valid(_read_certificate(pem)[0])


def test_a_fingerprint_may_be_written_as_openssl_prints_it(tmp_path: Path) -> None:
    plain = fingerprint("ben")
    printed = ":".join(plain[i : i + 2] for i in range(0, 64, 2)).upper()
    for text in (printed, f"sha256 Fingerprint={printed}", plain):
        (tmp_path / "revoked").write_text(f"\n  {text}\n# {fingerprint('ada')}\n")
        assert Revoked(tmp_path / "revoked")._current() == {plain}


def test_beside_a_line_that_is_wrong_the_others_count(tmp_path: Path) -> None:
    file = tmp_path / "revoked"
    file.write_text(fingerprint("ben"))
    revoked = Revoked(file)
    file.write_text(f"oops\n{fingerprint('ada')}\n")
    assert revoked._current() == {fingerprint("ben"), fingerprint("ada")}


@pytest.mark.parametrize("spoil", ["no fingerprint", "gone", "not text"])
def test_a_list_that_cannot_be_read_leaves_the_last_one_in_force(
    spoil: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "revoked"
    file.write_text(fingerprint("ben"))
    revoked = Revoked(file)
    if spoil == "gone":
        file.unlink()
    else:
        file.write_bytes(b"\xff" if spoil == "not text" else b"ben")
    with caplog.at_level(logging.ERROR):
        assert revoked._current() == {fingerprint("ben")}
        assert revoked._current() == {fingerprint("ben")}
    (said,) = caplog.messages  # once, not at each call
    assert "stay revoked" in said
    file.unlink(missing_ok=True)
    file.write_text(f"{fingerprint('ada')}\n")
    settle(file)
    assert revoked._current() == {fingerprint("ada")}


def test_a_list_that_could_not_be_read_once_is_read_again_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "revoked"
    file.write_text("")
    revoked = Revoked(file)
    file.write_text(fingerprint("ben"))
    settle(file)

    def refuse(path: Path, **options: str) -> str:
        raise PermissionError("not now")

    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_text", refuse)
        assert revoked._current() == frozenset()
    assert revoked._current() == {fingerprint("ben")}


def test_at_the_start_a_list_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Revoked(tmp_path / "nowhere")
