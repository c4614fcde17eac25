"""Certificates: whom TLS lets in, what they say, and who can read the keys."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import stat
import threading
from collections.abc import Callable
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedcompo.errors import ConfigError, ContributionError
from fedcompo.service.authority import Authority
from fedcompo.service.certificates import Credential
from fedcompo.storage.files import write_private


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create()


def files(credential: Credential, folder: Path, stem: str) -> tuple[Path, Path]:
    credential.save(folder, stem)
    return folder / f"{stem}.crt", folder / f"{stem}.key"


def handshake(
    folder: Path,
    authority: Authority,
    server: Credential,
    client: Credential | None = None,
    host: str = "localhost",
) -> str:
    """Connect by TLS, both ends in strict mode; returns the server's error, or the client's name.

    Raises:
        ssl.SSLError: If the client does not trust the server.
    """
    trusted = authority.credential.certificate.decode()
    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accepting.load_verify_locations(cadata=trusted)
    accepting.load_cert_chain(*files(server, folder, "server"))
    accepting.verify_mode = ssl.CERT_REQUIRED if client else ssl.CERT_NONE
    accepting.verify_flags |= ssl.VERIFY_X509_STRICT
    asking = ssl.create_default_context(cadata=trusted)
    asking.verify_flags |= ssl.VERIFY_X509_STRICT
    if client:
        asking.load_cert_chain(*files(client, folder, "client"))
    near, far = socket.socketpair()
    found: list[str] = []

    def serve() -> None:
        try:
            with accepting.wrap_socket(far, server_side=True) as secure:
                subject = (secure.getpeercert() or {}).get("subject", ())
                found.append(dict(pair for part in subject for pair in part).get("commonName", ""))
                secure.sendall(b"hello")
        except OSError as error:
            found.append(str(error))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with asking.wrap_socket(near, server_hostname=host) as secure:
            secure.settimeout(10)
            with contextlib.suppress(OSError):  # the server says why
                secure.recv(5)
    finally:
        near.close()
        thread.join(10)
    return found[0]


@pytest.mark.parametrize("host", ["localhost", "fed.example.org", "127.0.0.1", "::1"])
def test_strict_verification_accepts_each_host_that_was_named(
    tmp_path: Path, authority: Authority, host: str
) -> None:
    server = authority.issue_server(["localhost", "fed.example.org", "127.0.0.1", "::1"])
    assert handshake(tmp_path, authority, server, host=host) == ""


def test_a_host_that_was_not_named_is_refused(tmp_path: Path, authority: Authority) -> None:
    server = authority.issue_server(["localhost"])
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(tmp_path, authority, server, host="fed.example.org")


def test_the_server_learns_the_clients_name(tmp_path: Path, authority: Authority) -> None:
    server = authority.issue_server(["localhost"])
    assert handshake(tmp_path, authority, server, authority.issue_client("Krankenhaus ä")) == (
        "Krankenhaus ä"
    )


def test_an_expired_certificate_is_refused(tmp_path: Path, authority: Authority) -> None:
    server = authority.issue_server(["localhost"])
    expired = authority.issue_client("a", days=-1)
    assert "certificate has expired" in handshake(tmp_path, authority, server, expired)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda authority: authority.issue_server(["localhost"], days=-1), "has expired"),
        (lambda authority: Authority.create().issue_server(["localhost"]), "verify failed"),
        (lambda authority: authority.issue_client("localhost"), "purpose"),
    ],
    ids=["expired", "of another authority", "a client's"],
)
def test_what_is_not_this_authoritys_server_today_is_refused(
    tmp_path: Path, authority: Authority, make: Callable[[Authority], Credential], why: str
) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=why):
        handshake(tmp_path, authority, make(authority))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda authority: Authority.create().issue_client("a"), "verify failed"),
        (lambda authority: authority.issue_server(["localhost"]), "purpose"),
    ],
    ids=["of another authority", "a server's"],
)
def test_what_is_not_this_authoritys_client_is_refused(
    tmp_path: Path, authority: Authority, make: Callable[[Authority], Credential], why: str
) -> None:
    server = authority.issue_server(["localhost"])
    assert why in handshake(tmp_path, authority, server, make(authority))


def test_an_expired_authority_vouches_for_nobody(tmp_path: Path) -> None:
    expired = Authority.create(days=-1)
    with pytest.raises(ssl.SSLCertVerificationError, match="has expired"):
        handshake(tmp_path, expired, expired.issue_server(["localhost"]))


def test_grpc_accepts_both_sides_and_names_the_client(authority: Authority) -> None:
    server, client = authority.issue_server(["127.0.0.1"]), authority.issue_client("hospital-a")
    trusted = authority.credential.certificate
    names: list[bytes] = []

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        names.extend(context.auth_context()["x509_common_name"])
        return request

    handler = grpc.method_handlers_generic_handler(
        "test.Test", {"Echo": grpc.unary_unary_rpc_method_handler(answer)}
    )
    serving = grpc.server(futures.ThreadPoolExecutor(1), handlers=(handler,))
    secured = grpc.ssl_server_credentials(
        [(server.key, server.certificate)], trusted, require_client_auth=True
    )
    port = serving.add_secure_port("127.0.0.1:0", secured)
    serving.start()
    try:
        asking = grpc.ssl_channel_credentials(trusted, client.key, client.certificate)
        with grpc.secure_channel(f"127.0.0.1:{port}", asking) as channel:
            assert channel.unary_unary("/test.Test/Echo")(b"x", timeout=20) == b"x"
        stranger = Authority.create().issue_client("hospital-a")
        posing = grpc.ssl_channel_credentials(trusted, stranger.key, stranger.certificate)
        with (
            grpc.secure_channel(f"127.0.0.1:{port}", posing) as channel,
            pytest.raises(grpc.RpcError),
        ):
            channel.unary_unary("/test.Test/Echo")(b"x", timeout=5)
    finally:
        serving.stop(None).wait()
    assert names == [b"hospital-a"]


@pytest.mark.parametrize(
    ("operator", "unit"), [(False, "client"), (True, "operator")], ids=["client", "operator"]
)
def test_a_certificate_says_what_its_holder_may_be(
    authority: Authority, operator: bool, unit: str
) -> None:
    issued = authority.issue_client("a", operator=operator)
    subject = x509.load_pem_x509_certificate(issued.certificate).subject
    found = {part.oid: part.value for part in subject}
    assert found[NameOID.COMMON_NAME] == "a"
    assert found[NameOID.ORGANIZATIONAL_UNIT_NAME] == unit


def test_keys_lie_on_the_curve_p_384(authority: Authority) -> None:
    for credential in (authority.credential, authority.issue_client("a")):
        key = x509.load_pem_x509_certificate(credential.certificate).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert isinstance(key.curve, ec.SECP384R1)


@pytest.mark.parametrize(
    "host",
    ["", "https://fed.example.org", "fed.example.org:443", "[::1]", "192.0.2.700", "-a", "ü.org"],
)
def test_a_host_that_is_none_is_refused(authority: Authority, host: str) -> None:
    with pytest.raises(ConfigError, match="neither a DNS name nor an IP address"):
        authority.issue_server(["localhost", host])


def test_a_server_needs_a_host(authority: Authority) -> None:
    with pytest.raises(ConfigError, match="needs a host"):
        authority.issue_server([])


def test_names_that_cannot_be_clients_are_refused(authority: Authority) -> None:
    with pytest.raises(ContributionError, match="cannot be a client's name"):
        authority.issue_client("../a")
    with pytest.raises(ConfigError, match="takes 66 bytes"):
        authority.issue_client("ä" * 33)


# Files.


def test_keys_are_their_owners_alone_whatever_the_umask(
    tmp_path: Path, authority: Authority
) -> None:
    before = os.umask(0)
    try:
        authority.save(tmp_path)
        authority.issue_client("a").save(tmp_path / "a", "client")
    finally:
        os.umask(before)
    for key in (tmp_path / "ca.key", tmp_path / "a" / "client.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert (tmp_path / "ca.crt").read_bytes() == authority.credential.certificate


def test_a_private_file_is_made_with_its_final_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    fdopen = os.fdopen

    def look(handle: int, mode: str) -> object:
        modes.append(stat.S_IMODE(os.fstat(handle).st_mode))
        return fdopen(handle, mode)

    monkeypatch.setattr("os.fdopen", look)
    write_private(tmp_path / "key", b"secret")
    assert modes == [0o600]
    assert (tmp_path / "key").read_bytes() == b"secret"


def test_nothing_is_written_over(tmp_path: Path, authority: Authority) -> None:
    authority.save(tmp_path)
    with pytest.raises(FileExistsError):
        Authority.create().save(tmp_path)
    again = Authority.load(tmp_path / "ca.crt", tmp_path / "ca.key")
    assert again == authority


def test_a_loaded_authority_vouches_like_the_saved_one(
    tmp_path: Path, authority: Authority
) -> None:
    authority.save(tmp_path)
    loaded = Authority.load(tmp_path / "ca.crt", tmp_path / "ca.key")
    assert handshake(tmp_path, authority, loaded.issue_server(["localhost"])) == ""


def test_what_is_no_authority_is_not_loaded(tmp_path: Path, authority: Authority) -> None:
    authority.save(tmp_path)
    authority.issue_client("a").save(tmp_path, "a")
    Authority.create().save(tmp_path / "other")
    (tmp_path / "junk").write_text("junk")
    ca, key = tmp_path / "ca.crt", tmp_path / "ca.key"
    for certificate, private, why in (
        (tmp_path / "a.crt", tmp_path / "a.key", "expected an authority's"),
        (ca, tmp_path / "other" / "ca.key", "are no pair"),
        (tmp_path / "junk", key, r"certificate .*junk cannot be read"),
        (ca, tmp_path / "junk", r"key .*junk cannot be read"),
        (ca, tmp_path / "none", r"key .*none cannot be read"),
    ):
        with pytest.raises(ConfigError, match=why):
            Authority.load(certificate, private)


def test_keys_do_not_show_when_printed(authority: Authority) -> None:
    for thing in (authority, authority.issue_client("a")):
        assert "PRIVATE" not in repr(thing)
        assert "CERTIFICATE" in repr(thing)
