"""Who is let in: TLS and the certificate decide, and who is refused leaves a line in the log."""

from __future__ import annotations

import datetime
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from registry_builders import three_clients
from service_runs import (
    authority,
    channel,
    code_of,
    credential,
    served,
    server_credential,
    unchanged,
)

from fedcompo.service import registry_pb2 as wire
from fedcompo.service.access import peer_of
from fedcompo.service.authority import Authority
from fedcompo.service.certificates import Credential
from fedcompo.service.methods import RegistryStub
from fedcompo.service.refusals import Code, Refused


def handmade(
    *names: str, units: tuple[str, ...] = ("client",), issuer: Credential | None = None
) -> Credential:
    """A certificate as no authority of ours issues it; self-signed without an issuer."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names]
        + [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit) for unit in units]
    )
    above, signer = subject, key
    if issuer is not None:
        above = x509.load_pem_x509_certificate(issuer.certificate).subject
        signer = serialization.load_pem_private_key(issuer.key, None)
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(above)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(signer, hashes.SHA384())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return Credential(certificate.public_bytes(serialization.Encoding.PEM), private)


REFUSED = {
    "none": (lambda: None, "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
    "of another authority": (lambda: Authority.create().issue_client("ada"), "issuer"),
    "self-signed": (lambda: handmade("ada"), "self signed|self-signed|issuer"),
    "expired": (lambda: authority().issue_client("ada", days=-1), "expired"),
    "the server's own": (server_credential, "purpose"),
}


@pytest.mark.parametrize(("given", "why"), REFUSED.values(), ids=REFUSED)
def test_who_is_not_vouched_for_today_is_refused_and_logged(tmp_path, capfd, given, why):
    registry = three_clients(tmp_path / "registry")
    calls = {
        "Remove": wire.RemoveRequest(client="ada"),
        "List": wire.ListRequest(),
    }
    with served(registry) as address, unchanged(registry):
        capfd.readouterr()
        with channel(address, given()) as opened:
            stub = RegistryStub(opened)
            for method, request in calls.items():
                call = getattr(stub, method)
                assert code_of(lambda c=call, r=request: c(r, timeout=60)) is Code.UNAVAILABLE
            check = health_pb2_grpc.HealthStub(opened).Check
            request = health_pb2.HealthCheckRequest()
            assert code_of(lambda: check(request, timeout=60)) is Code.UNAVAILABLE
        logged = capfd.readouterr().err
    assert "Handshake failed" in logged
    assert any(word in logged for word in why.split("|"))


NOBODIES = {
    "no folder": ("../ada",),
    "reserved": ("con",),
    "two names": ("ada", "ben"),
    "no name": (),
    "an empty name": (" ",),
    "look-alikes mixed": ("аda",),
}


@pytest.mark.parametrize("names", NOBODIES.values(), ids=NOBODIES)
def test_a_certificate_must_name_one_who_could_be_a_client(tmp_path, names):
    registry = three_clients(tmp_path / "registry")
    given = handmade(*names, issuer=authority().credential)
    with served(registry) as address, unchanged(registry), channel(address, given) as opened:
        stub = RegistryStub(opened)
        assert code_of(lambda: stub.List(wire.ListRequest(), timeout=60)) is Code.UNAUTHENTICATED


@pytest.mark.parametrize("units", [(), ("server",), ("client", "operator"), ("operator", "client")])
def test_the_role_is_one_that_the_authority_gives(units):
    given = handmade("ada", units=units, issuer=authority().credential)
    with pytest.raises(Refused, match="organizational units") as caught:
        peer_of(calling(given.certificate))
    assert caught.value.code is Code.UNAUTHENTICATED


def test_name_role_and_fingerprint_are_those_of_the_certificate():
    client = peer_of(calling(credential("ada").certificate))
    operator = peer_of(calling(credential("olga", operator=True).certificate))
    parsed = x509.load_pem_x509_certificate(credential("ada").certificate)
    assert (client.name, client.operator) == ("ada", False)
    assert (operator.name, operator.operator) == ("olga", True)
    assert client.fingerprint == parsed.fingerprint(hashes.SHA256()).hex()


@pytest.mark.parametrize(
    ("pem", "why"),
    [(b"", "mutual TLS"), (b"-----BEGIN CERTIFICATE-----\nx\n", "names nobody")],
)
def test_without_a_certificate_there_is_no_peer(pem, why):
    with pytest.raises(Refused, match=why):
        peer_of(calling(pem))


def test_a_certificate_that_expires_while_the_connection_lasts_is_refused():
    expired = authority().issue_client("ada", days=-1)
    with pytest.raises(Refused, match="holds from"):
        peer_of(calling(expired.certificate))


def calling(pem: bytes) -> grpc.ServicerContext:
    """What the service sees of a connection."""
    return SimpleNamespace(auth_context=lambda: {"x509_pem_cert": [pem]} if pem else {})


def test_keys_are_shown_nowhere(tmp_path: Path) -> None:
    assert "PRIVATE" not in repr(credential("ada"))
