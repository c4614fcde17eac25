"""Requests, approvals and renewals: what is certified, what is refused, and that no key travels."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from cli_runs import run
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from registry_builders import three_clients

from fedcompo.deployment import approval, folders, given_app
from fedcompo.deployment.plan import Deployment, server_holder
from fedcompo.errors import ConfigError, ServiceError
from fedcompo.service.authority import Authority
from fedcompo.service.certificates import (
    Credential,
    Holder,
    key_digest,
    read_certificate,
    read_credential,
)
from fedcompo.service.client import Client
from fedcompo.service.requests import NODE_KEY_EXTENSION, Request, prepare, save
from fedcompo.service.server import Server, Settings, serve

HOST = "localhost"
ROLES = {"ada": "client", "ben": "client", "server": "server"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment without an app, in which nobody has been approved."""
    folder = tmp_path_factory.mktemp("deployment") / "fed"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(given_app, "give", lambda app, folder: folder.mkdir())
        folders.create(folder, Deployment(HOST, ("ada", "ben")), folder.parent)
    return folder


@pytest.fixture
def fed(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "fed"))


def machine(fed: Path, name: str) -> Path:
    """A machine's copy of the folder that was written for it."""
    source = fed / "server" if name == "server" else fed / "clients" / name
    target = fed.parent / "machines" / name
    return target if target.exists() else Path(shutil.copytree(source, target))


def requested(fed: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The request that a machine makes; returns the file that is sent."""
    monkeypatch.chdir(machine(fed, name))
    printed = run("request-certificate").output
    assert "PRIVATE" not in printed
    file = Path.cwd() / "certificates" / f"{name}.request"
    assert Request.read(file).fingerprint in printed
    monkeypatch.chdir(fed.parent)
    return file


def asked(fed: Path, name: str, folder: str = "keys") -> Path:
    """The same without the command, with keys in a folder of their own."""
    holder = Deployment.load(fed).holders[name]
    return save(prepare(fed.parent / folder / name, holder), fed.parent / folder)


def private_files(folder: Path) -> list[str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(
        file.relative_to(folder).as_posix() for file in files if b"PRIVATE" in file.read_bytes()
    )


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before = contents(folder)
    yield
    assert contents(folder) == before


def refused(fed: Path, file: Path, why: str, *more: object) -> None:
    """The command to approve a request must fail, and leave every file as it is."""
    with unchanged(fed):
        done = run("init-deployment", fed, "--approve", file, *more, "--yes", code=2)
    assert why in " ".join(done.stderr.split()), done.stderr


def test_keys_stay_where_they_are_made_and_open_the_service(
    fed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert private_files(fed) == ["authority/ca.key", "operator/operator.key"]
    requests = [requested(fed, name, monkeypatch) for name in ROLES]
    words = [word for file in requests for word in ("--approve", file)]
    with unchanged(fed):
        run("init-deployment", fed, *words, answer="n\n", code=1)
    printed = run("init-deployment", fed, *words, answer="y\n").output
    assert "go on with the README.md there" in printed and "again" not in printed
    for name, file in zip(ROLES, requests, strict=True):
        assert Request.read(file).fingerprint in printed
        # What the operator is told to copy.
        home, role = machine(fed, name) / "certificates", ROLES[name]
        place = fed / ("server" if role == "server" else f"clients/{name}") / "certificates"
        assert str(place / f"{role}.crt") in printed
        shutil.copy(place / f"{role}.crt", home)
        keys = sorted(path for path in home.iterdir() if b"PRIVATE" in path.read_bytes())
        assert len(keys) == (1 if role == "server" else 2)
        assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
        run("check-certificate", home)
    # Nothing private left a machine, nor reached the approving side.
    assert private_files(fed) == ["authority/ca.key", "operator/operator.key"]
    assert not [file for file in requests if b"PRIVATE" in file.read_bytes()]
    for name in ("ada", "ben"):
        listed = fed / "server" / "clients" / f"{name}.pub"
        own = serialization.load_ssh_private_key(
            (machine(fed, name) / "certificates" / "supernode").read_bytes(), None
        )
        assert serialization.load_ssh_public_key(listed.read_bytes()) == own.public_key()
        shown = subprocess.run(["ssh-keygen", "-lf", listed], capture_output=True, text=True)
        assert shown.returncode == 0 and f"{name} (ECDSA)" in shown.stdout
    _serve_and_call(fed, monkeypatch)


def _serve_and_call(fed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service starts with the server's files; a client calls it with its own."""
    registry = three_clients(fed.parent / "registry")
    certificates = machine(fed, "server") / "certificates"
    settings = Settings(
        registry.path,
        (certificates / "ca.crt").read_bytes(),
        read_credential(certificates / "server.crt", certificates / "server.key"),
        port=0,
    )
    monkeypatch.chdir(machine(fed, "ben") / "certificates")
    with Server(settings) as server:
        there = ["--server", f"{HOST}:{server.port}", "--ca", "ca.crt"]
        own = ["--certificate", "client.crt", "--key", "client.key"]
        assert "ben" in run("members", *there, *own).output
        stranger = Authority.create().issue_client("ben")
        ca = Path("ca.crt").read_bytes()
        with (
            Client(f"{HOST}:{server.port}", ca, stranger, attempts=1) as posing,
            pytest.raises(ServiceError, match="does not accept the certificate"),
        ):
            posing.list()


def test_asking_again_keeps_the_keys(fed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Request.read(requested(fed, "ada", monkeypatch))
    again = Request.read(requested(fed, "ada", monkeypatch))
    assert (first.key, first.node_key) == (again.key, again.node_key)
    key = machine(fed, "ada") / "certificates" / "client.key"
    key.chmod(0o644)
    monkeypatch.chdir(machine(fed, "ada"))
    assert "others may read it" in run("request-certificate", code=2).stderr
    key.chmod(0o600)
    key.write_bytes(key.read_bytes()[:40])
    with unchanged(Path.cwd()):
        assert "cannot be used" in run("request-certificate", code=2).stderr


def test_keys_can_be_made_outside_of_a_deployment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for wrong in ([], ["--name", "a"], ["--name", "a", "--host", "x.org", "-o", "keys"]):
        run("request-certificate", *wrong, code=2)
    assert list(tmp_path.iterdir()) == []
    run("request-certificate", "--name", "a", "-o", "keys")
    run("request-certificate", "--host", "x.org", "-o", "keys")
    assert Request.read(Path("keys/server.request")).holder == server_holder("x.org")
    shown = ["openssl", "req", "-in", "keys/a.request", "-noout", "-verify", "-subject"]
    done = subprocess.run(shown, capture_output=True, text=True, check=True)
    assert "OK" in done.stdout + done.stderr
    assert "CN" in done.stdout and "fedcompo" in done.stdout


def signed(
    holder: Holder, key: object = None, node_key: object = None, *extensions: x509.ExtensionType
) -> bytes:
    """A request as ours would not make it."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(holder.subject)
    if node_key is None:
        node_key = ec.generate_private_key(ec.SECP384R1()).public_key()
    if node_key:
        line = node_key.public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        builder = builder.add_extension(
            x509.UnrecognizedExtension(NODE_KEY_EXTENSION, line), critical=False
        )
    names = holder.alternatives
    for extension in (*extensions, *([names] if names else [])):
        builder = builder.add_extension(extension, critical=False)
    made = builder.sign(key or ec.generate_private_key(ec.SECP384R1()), hashes.SHA384())
    return made.public_bytes(serialization.Encoding.PEM)


def altered(name: str = "ada") -> bytes:
    """A request in which a name was exchanged after it had been signed."""
    made = x509.load_pem_x509_csr(signed(Holder("eve")))
    der = made.public_bytes(serialization.Encoding.DER).replace(b"eve", name.encode())
    return x509.load_der_x509_csr(der).public_bytes(serialization.Encoding.PEM)


WEAK = ec.generate_private_key(ec.SECP256R1())
LIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "altered": (altered, "was altered on its way"),
    "no request": (lambda: b"-----BEGIN CERTIFICATE REQUEST-----\n", "is no request"),
    "of nobody": (lambda: signed(Holder("eve")), "'eve' is not in the plan"),
    "as operator": (
        lambda: signed(Holder("ada", "operator"), None, b""),
        "request is of the operator, but the plan has the client ada",
    ),
    "as the operator": (lambda: signed(Holder("operator", "operator"), None, b""), "is of the op"),
    "RSA": (lambda: signed(Holder("ada"), rsa.generate_private_key(65537, 2048)), "RSAPublicKey"),
    "P-256": (lambda: signed(Holder("ada"), WEAK), "secp256r1, expected secp384r1"),
    "node key P-256": (lambda: signed(Holder("ada"), None, WEAK.public_key()), "secp256r1"),
    "node key Ed25519": (
        lambda: signed(Holder("ada"), None, ed25519.Ed25519PrivateKey.generate().public_key()),
        "Ed25519PublicKey",
    ),
    "no node key": (lambda: signed(Holder("ada"), None, b""), "send a key for the SuperLink"),
    "foreign host": (
        lambda: signed(server_holder(HOST, "bank.example.org"), None, b""),
        "but the plan has the server for localhost, 127.0.0.1",
    ),
    "to certify others": (
        lambda: signed(Holder("ada"), None, None, x509.BasicConstraints(ca=True, path_length=0)),
        "asks for 2.5.29.19, which nobody gets",
    ),
    "a client's host": (
        lambda: signed(
            Holder("ada"), None, None, x509.SubjectAlternativeName([x509.DNSName(HOST)])
        ),
        "is no role of a holder",
    ),
}


@pytest.mark.parametrize(("lie", "why"), LIES.values(), ids=LIES)
def test_a_request_that_lies_is_refused(fed: Path, lie: Callable[[], bytes], why: str) -> None:
    file = fed.parent / "sent.request"
    file.write_bytes(lie())
    refused(fed, file, why)


def test_all_are_approved_or_none(fed: Path) -> None:
    good, bad = asked(fed, "ada"), fed.parent / "bad.request"
    bad.write_bytes(altered("ben"))
    refused(fed, good, "was altered", "--approve", bad)
    refused(fed, good, "Two requests bear one name", "--approve", good)
    run("init-deployment", fed, "--approve", good, "--approve", asked(fed, "ben"), "--yes")
    assert len(list((fed / "server" / "clients").iterdir())) == 2


def test_a_node_key_of_somebody_else_is_refused(fed: Path) -> None:
    run("init-deployment", fed, "--approve", asked(fed, "ada"), "--yes")
    (fed.parent / "keys" / "ben").mkdir()
    shutil.copy(fed.parent / "keys" / "ada" / "supernode", fed.parent / "keys" / "ben")
    refused(fed, asked(fed, "ben"), "in the request of ben is that of ada")


def test_another_key_is_approved_only_where_that_is_meant(fed: Path) -> None:
    run("init-deployment", fed, "--approve", asked(fed, "ada"), "--yes")
    old = (fed / "clients/ada/certificates/client.crt").read_bytes()
    other = asked(fed, "ada", "other")
    refused(fed, other, "has been approved with another key (TLS, until 20")
    (fed.parent / "other" / "ada" / "client.key").unlink()
    shutil.copy(fed.parent / "keys" / "ada" / "client.key", fed.parent / "other" / "ada")
    refused(fed, asked(fed, "ada", "other"), "with another key (the SuperLink)")
    refused(fed, other, "No request is of ben", "--renew", "ben")
    third = asked(fed, "ada", "third")
    said = run("init-deployment", fed, "--approve", third, "--renew", "ada", "--yes").output
    assert key_digest(x509.load_pem_x509_certificate(old).public_key()) in said
    assert "revoked" in said and "with its new keys, and start it again" in said
    assert "start ./start-superlink again" in said
    request = Request.read(third)
    assert (fed / "server/clients/ada.pub").read_bytes() == request.node_key + b" ada\n"


def issued(fed: Path, name: str) -> Path:
    holder = Deployment.load(fed).holders[name]
    return fed / approval.place_of(holder)


def test_renewal_needs_no_key_but_the_authoritys(
    fed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [asked(fed, name) for name in ROLES]
    run("init-deployment", fed, *(w for f in files for w in ("--approve", f)), "--yes")
    names = [*ROLES, "operator"]
    before = {name: read_certificate(issued(fed, name)) for name in names}
    shutil.rmtree(fed.parent / "keys")
    (fed / "operator" / "operator.key").rename(tmp_path / "elsewhere")
    printed = run("init-deployment", fed, "--renew", ",".join(names)).output
    ca = read_certificate(fed / "authority" / "ca.crt")
    for name in names:
        after = read_certificate(issued(fed, name))
        after.verify_directly_issued_by(ca)
        assert after.serial_number != before[name].serial_number
        assert after.public_key() == before[name].public_key()
        assert Holder.of(after) == Holder.of(before[name])
    # The key is the same: to lock it out would lock out the new certificate.
    assert "The old one holds until 20" in printed and "revoked" not in printed
    assert private_files(fed) == ["authority/ca.key"]


def test_who_has_no_certificate_of_this_authority_is_not_renewed(fed: Path) -> None:
    def fails(name: str, why: str) -> None:
        with unchanged(fed):
            assert why in run("init-deployment", fed, "--renew", name, code=2).stderr

    fails("eve", "'eve' is not in the plan")
    fails("ada", "ada has no certificate yet")
    # Who exchanges a file in the folder gets no certificate for a key of its own.
    issued(fed, "ada").write_bytes(Authority.create().issue_client("ada").certificate)
    fails("ada", "not what this deployment's authority issued for the client ada")
    refused(fed, asked(fed, "ada"), "is of another authority")
    authority = approval.authority_of(fed)
    issued(fed, "ada").write_bytes(authority.issue_client("ben").certificate)
    fails("ada", "not what this deployment's authority issued")
    issued(fed, "server").write_bytes(authority.issue_server(["x.org"]).certificate)
    fails("server", "issued for the server for localhost, 127.0.0.1")


@pytest.mark.parametrize("written", range(5))
def test_an_interrupted_approval_leaves_the_old_state_or_the_new(
    fed: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    requests = approval.read_requests(fed, [asked(fed, "ada"), asked(fed, "ben")])
    before, left = contents(fed), written
    write = approval.write_atomically

    def interrupted(path: Path, data: bytes) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        write(path, data)

    monkeypatch.setattr(approval, "write_atomically", interrupted)
    with pytest.raises(KeyboardInterrupt):
        approval.approve(fed, requests)
    monkeypatch.undo()
    if not written:
        assert contents(fed) == before
        return
    approval.opened(fed)
    after = contents(fed)
    assert approval.PENDING not in after
    assert after.keys() - before.keys() == {
        f"{place}{name}{rest}"
        for name in ("ada", "ben")
        for place, rest in (("clients/", "/certificates/client.crt"), ("server/clients/", ".pub"))
    }
    for request in requests:
        certificate = read_certificate(issued(fed, request.holder.name))
        assert certificate.public_key() == request.key


def test_nothing_else_is_done_in_the_same_call(fed: Path) -> None:
    with unchanged(fed):
        for words in (
            ["--approve", "x", "--server", "x.org"], ["--renew", "ada", "--port", "1"],
            ["--renew", "ada", "--with-keys"], ["--add", "d", "--renew", "ada"],
            ["--update", "--renew", "ada"], ["--update", "--with-keys"],
        ):  # fmt: skip
            assert "no other option" in run("init-deployment", fed, *words, code=2).stderr


# How long certificates hold.


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create()


def laid(folder: Path, authority: Authority, credential: Credential, stem: str) -> Path:
    credential.save(folder, stem)
    (folder / "ca.crt").write_bytes(authority.credential.certificate)
    return folder


def test_an_end_is_warned_of_sixty_days_before(tmp_path: Path, authority: Authority) -> None:
    for days, said in ((61, ""), (59, "Warning: The certificate of ada ends on 20")):
        soon = authority.issue_client("ada", days=days)
        done = run("check-certificate", laid(tmp_path / str(days), authority, soon, "client"))
        assert (said in done.stderr) if said else not done.stderr
        assert "holds until 20" in done.stdout
    assert "in 58 days" in done.stderr and "--renew ada`" in done.stderr
    short = Authority.create(days=30)
    long = short.issue_client("ada")
    done = run("check-certificate", laid(tmp_path / "ca", short, long, "client"))
    assert "The authority's certificate ends on 20" in done.stderr
    end = x509.load_pem_x509_certificate(long.certificate).not_valid_after_utc
    assert end == short.credential.parsed.not_valid_after_utc


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda good: (good, good.issue_client("ada", days=-1)), "certificate of ada ended on 20"),
        (lambda good: (good, Authority.create().issue_client("ada")), "of another authority"),
        (lambda good: (good, replace(good.issue_client("ada"), key=b"")), "cannot be read"),
        (
            lambda good: ((old := Authority.create(days=-1)), old.issue_client("ada")),
            "The authority's certificate ended on 20",
        ),
    ],
    ids=["ended", "foreign", "no key", "authority ended"],
)
def test_what_does_not_hold_is_a_sentence(
    tmp_path: Path,
    authority: Authority,
    make: Callable[[Authority], tuple[Authority, Credential]],
    why: str,
) -> None:
    trusted, credential = make(authority)
    laid(tmp_path, trusted, credential, "client")
    assert why in run("check-certificate", tmp_path, code=2).stderr
    (tmp_path / "client.crt").unlink()
    assert "no certificate yet" in run("check-certificate", tmp_path, code=2).stderr


@contextmanager
def serving(folder: Path, authority: Authority, days: int) -> Iterator[list[str]]:
    """A service whose certificate holds so many days; yields a client's words to call it."""
    registry = three_clients(folder / "registry")
    credential = authority.issue_server([HOST], days=days)
    laid(folder, authority, authority.issue_client("ben"), "client")
    settings = Settings(registry.path, authority.credential.certificate, credential, port=0)
    with Server(settings) as server:
        files = {name: folder / name for name in ("ca.crt", "client.crt", "client.key")}
        words = ["--ca", "--certificate", "--key"]
        pairs = zip(words, map(str, files.values()), strict=True)
        yield ["--server", f"{HOST}:{server.port}", *(word for pair in pairs for word in pair)]


def test_a_client_hears_of_the_servers_end(tmp_path: Path, authority: Authority) -> None:
    with serving(tmp_path / "soon", authority, days=30) as there:
        done = run("members", *there, "--json")
        assert "The server's certificate ends on 20" in done.stderr
        assert "--renew server`" in done.stderr
        assert done.stdout.startswith("{")
    with serving(tmp_path / "ended", authority, days=-1) as there:
        assert "has ended" in run("members", *there, code=2).stderr


def test_a_service_warns_of_its_own_end_each_day_and_does_not_begin_after_it(
    tmp_path: Path,
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = three_clients(tmp_path / "registry")
    monkeypatch.setattr("fedcompo.service.server.DAY", 0.05)
    trusted = authority.credential.certificate
    soon, ended = (authority.issue_server([HOST], days=days) for days in (30, -1))
    with pytest.raises(ConfigError, match="The server's certificate ended on 20"):
        serve(Settings(registry.path, trusted, ended, port=0), on_ready=lambda server: None)

    def end_later(server: Server) -> None:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()

    serve(Settings(registry.path, trusted, soon, port=0), on_ready=end_later)
    said = [record.getMessage() for record in caplog.records]
    assert sum("The server's certificate ends on 20" in line for line in said) > 2
