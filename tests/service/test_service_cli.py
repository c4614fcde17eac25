"""The commands: serve, publish, fetch, request-removal."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import run, told
from registry_builders import contents, member, three_clients
from service_runs import authority, credential, saved, served, server_credential

from fedcompo.registry.registry import Registry
from fedcompo.registry.removal import RemovalRecord
from fedcompo.registry.signing import PUBLIC, fingerprint_of
from fedcompo.service.client import Client


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where the commands are given: certificates and a registry lie there."""
    three_clients(tmp_path / "registry")
    authority().save(tmp_path)
    server_credential().save(tmp_path, "server")
    for name in ("ada", "ben", "dee"):
        credential(name).save(tmp_path, name)
    credential("olga", operator=True).save(tmp_path, "olga")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDCOMPO_KNOWN", str(tmp_path / "known.json"))  # each has its own copy
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:1")  # it refuses; loopback needs none
    for variable in ("SERVER", "CA", "CERTIFICATE", "KEY", "REGISTRY"):
        monkeypatch.delenv(f"FEDCOMPO_{variable}", raising=False)
    return tmp_path


@pytest.fixture
def address(home):
    with served(Registry(home / "registry")) as listening:
        yield listening


def as_(name, address):
    return ["--server", address, "--ca", "ca.crt", *own(name)]


def own(name):
    return ["--certificate", f"{name}.crt", "--key", f"{name}.key"]


def test_publish_and_publish_again(home, address):
    saved(member("dee", seed=8, classes=("emu",)), home / "dee")
    out = run("publish", "dee", *as_("dee", address)).stdout
    root = Registry("registry").state.root
    assert out == f"Published dee. Root {root}\n"
    found = told("publish", "dee", *as_("dee", address))
    assert found == {"client": "dee", "already": True, "root": root}
    out = run("publish", "dee", *as_("dee", address)).stdout
    assert out == f"dee was there already, with these files. Root {root}\n"


def test_publishing_in_another_name_fails(home, address):
    saved(member("dee", seed=8, classes=("emu",)), home / "dee")
    result = run("publish", "dee", *as_("ben", address), "--replace", code=1)
    assert "Everyone publishes in its own name" in result.output


def test_fetch_a_model_and_a_contribution(home, address):
    out = run("fetch", "-o", "m", "--only", "ada,cho", *as_("ben", address)).stdout
    assert out == "Model composed of ada, cho: m\n"
    run("compose", "-o", "expected", "--only", "ada,cho", "--registry", "registry")
    assert contents(home / "m") == contents(home / "expected")
    found = told("fetch", "ben", "-o", "mine", *as_("ben", address))
    assert found["clients"] == ["ben"]
    assert sorted(found["files"]) == sorted(path.name for path in (home / "mine").iterdir())
    assert (
        "PERMISSION_DENIED" in run("fetch", "ada", "-o", "x", *as_("ben", address), code=1).output
    )
    assert not (home / ".x.part").exists()
    run("fetch", "ben", "-o", "x", "--only", "ada", *as_("ben", address), code=2)
    run("fetch", "-o", "mine", *as_("ben", address), code=2)


def test_leave_with_a_receipt_that_verify_accepts(home, address, monkeypatch):
    monkeypatch.setenv("FEDCOMPO_SERVER", address)
    monkeypatch.setenv("FEDCOMPO_CA", "ca.crt")
    run("request-removal", *own("ben"), answer="n\n", code=1)
    assert "ben" in Registry("registry").clients
    out = run("request-removal", *own("ben"), "--reason", "moved", answer="y\n").stdout
    assert re.search(r"Removed ben on 20\S+\. Receipt: removal-ben\.json", out)
    assert Registry("registry").clients == ("ada", "cho")
    record = RemovalRecord.parse(Path("removal-ben.json").read_bytes(), source="x")
    assert (record.client, record.reason) == ("ben", "moved")
    run("verify", "removal-ben.json", "--public-key", "removal-ben.pem")
    run("request-removal", *own("ben"), "--yes", code=2)  # the receipt is there
    said = run("request-removal", *own("ben"), "--yes", "-o", "receipt.pem", code=2).stderr
    assert "receipt.pem will hold the public key" in said
    again = run("request-removal", *own("ben"), "--yes", "--json", "-o", "again.json").stdout
    assert again == Path("removal-ben.json").read_text()


def test_an_operator_lets_another_go(home, address):
    run("request-removal", "ada", *as_("ben", address), "--yes", code=1)
    run("request-removal", "ada", *as_("olga", address), "--yes", "-o", "ada.json")
    assert Registry("registry").clients == ("ben", "cho")


def test_who_has_left_is_shown_no_registry_of_before(home):
    shutil.copytree(home / "registry", home / "yesterday", symlinks=True)
    with served(Registry(home / "registry")) as address:
        run("request-removal", *as_("ben", address), "--yes")
    with served(Registry(home / "yesterday")) as address:  # nobody looked in between
        out = run("members", *as_("ben", address), code=1).output
    assert "was set back" in out


def test_a_receipt_of_what_the_registry_does_not_show_is_told(home, monkeypatch):
    shutil.copytree(home / "registry", home / "yesterday", symlinks=True)
    with served(Registry(home / "yesterday")) as lying, served(Registry("registry")) as address:
        leave = Client.remove

        def and_lie(client, *arguments, **options):
            receipt = leave(client, *arguments, **options)
            shown = Client(lying, authority().credential.certificate, credential("ben"))
            monkeypatch.setattr(Client, "list", lambda _: shown._list(0))
            return receipt

        monkeypatch.setattr(Client, "remove", and_lie)
        result = run("request-removal", *as_("ben", address), "--yes", code=1)
    assert "the removal is not in it, or was taken back" in result.output
    assert Path("removal-ben.json").exists()


def test_members_are_listed_and_their_claims_derived_again(home, address):
    registry = Registry("registry")
    found = told("members", *as_("ben", address))
    assert [member["client"] for member in found["members"]] == ["ada", "ben", "cho"]
    assert (found["root"], found["backbone"]) == (registry.state.root, registry.state.base)
    (ben,) = (member for member in found["members"] if member["client"] == "ben")
    assert ben["classes"] == list(registry.state.members["ben"].classes)
    assert "findings" not in found
    out = run("members", *as_("ben", address)).stdout
    key = fingerprint_of((registry.path / PUBLIC).read_bytes())  # for the telephone
    assert all(name in out for name in ("ada", "ben", "cho", registry.state.root, key))
    found = told("members", "--verify", *as_("ben", address))
    assert found["findings"]
    assert all(finding["holds"] for finding in found["findings"])
    file = registry.path / "clients" / "cho" / "contribution.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    out = run("members", "--verify", *as_("ben", address), code=1).output
    assert "cho" in out.partition("claims hold")[0]


WRONG = {
    "no ca": ["--ca", "nowhere.crt", *own("ben")],
    "no pair": ["--ca", "ca.crt", "--certificate", "ben.crt", "--key", "ada.key"],
    "a key for a ca": ["--ca", "ben.key", *own("ben")],
    "a certificate for a key": ["--ca", "ca.crt", "--certificate", "ben.crt", "--key", "ben.crt"],
}


@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
def test_certificates_that_cannot_be_used_are_wrong_settings(home, given):
    result = run("fetch", "-o", "m", "--server", "localhost:1", *given, code=2)
    assert "PRIVATE" not in result.output


@pytest.mark.parametrize("where", ["localhost", "localhost:x", ":9443", "localhost:99999"])
def test_an_address_has_a_host_and_a_port(home, where):
    run("fetch", "-o", "m", "--server", where, "--ca", "ca.crt", *own("ben"), code=2)


def test_a_text_that_is_none_is_refused(home, address):
    run("request-removal", "--yes", "--reason", "\udcff", *as_("ben", address), code=2)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("speed=3", "sets no limit"),
        ("rate", "not of the form key=value"),
        ("burst=1.5", "must be of type int, got 1.5"),
        ("calls=0", "must be > 0"),
        ("rate=nan", "must be finite"),
        ("seconds=inf", "must be finite"),
        ("message=2147483648", "must be at most 2147483647"),
    ],
)
def test_a_limit_that_is_none_is_refused(home, text, why):
    command = ["serve", "registry", "--ca", "ca.crt", *own("server"), "--limit", text]
    assert why in run(*command, code=2).output


def test_what_is_no_list_of_certificates_is_refused(home):
    command = ["serve", "registry", "--ca", "ca.crt", *own("server"), "--revoked", "list"]
    assert "cannot be read" in run(*command, code=2).output
    Path("list").write_text("# nobody\n\nben\n")
    assert "line 3: 'ben' is no SHA-256" in run(*command, code=2).output


def test_serve_until_sigterm(home):
    command = [sys.executable, "-m", "fedcompo.cli", "serve", "registry", "--port", "0"]
    command += ["--ca", "ca.crt", *own("server"), "--compose", "members"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as service:
        try:
            line = service.stdout.readline()
            port = re.fullmatch(
                r"Serving registry on 127\.0\.0\.1:(\d+); members may compose\.\n", line
            )
            assert port, (line, service.poll())
            found = told("fetch", "-o", "m", *as_("ben", f"localhost:{port[1]}"))
            assert found["clients"] == ["ada", "ben", "cho"]
            result = run("fetch", "ada", "-o", "x", *as_("ben", f"localhost:{port[1]}"), code=1)
            assert "Ask an operator" in result.output
            service.send_signal(signal.SIGTERM)
            out, err = service.communicate(timeout=120)
        finally:
            service.kill()
    assert (service.returncode, out) == (0, "Ended.\n")
    refused = [line for line in err.splitlines() if " refused " in line]
    (line,) = refused
    assert json.loads(line.partition(" refused ")[2])["code"] == "PERMISSION_DENIED"
    assert "PRIVATE" not in err


def test_serve_says_what_is_wrong(home):
    options = ["--ca", "ca.crt", *own("server"), "--port", "0"]
    assert "no registry" in run("serve", "nowhere", *options, code=1).output
    run("serve", "registry", *options, "--compose", "anyone", code=2)
    run(
        "serve",
        "registry",
        "--ca",
        "ca.crt",
        "--certificate",
        "server.crt",
        "--key",
        "ben.key",
        code=2,
    )


def test_a_shard_is_published_and_leaves_alone_or_with_the_others(home, address):
    connected = as_("dee", address)
    for number, name in enumerate(("dee.shard-0", "dee.shard-1")):
        saved(member(name, seed=8 + number, classes=("emu",)), home / name)
        assert f"Published {name}" in run("publish", name, *connected).stdout
        assert told("publish", name, *connected)["already"]
    saved(member("dee", seed=11, classes=("emu",)), home / "dee")
    assert "count twice" in run("publish", "dee", *connected, code=1).output
    denied = run("publish", "dee.shard-0", *as_("ben", address), "--replace", code=1).output
    assert "Everyone publishes in its own name" in denied
    run("request-removal", "dee", "--shard", "1", *as_("ben", address), "--yes", code=1)
    run("fetch", "dee.shard-1", "-o", "mine", *connected)
    assert "Shards of dee: 0, 1." in run("members", *connected).stdout
    run("request-removal", "--shard", "1", *connected, "--yes")
    assert Registry("registry").clients == ("ada", "ben", "cho", "dee.shard-0")
    receipt = RemovalRecord.parse(Path("removal-dee.shard-1.json").read_bytes(), source="x")
    assert receipt.client == "dee.shard-1"
    Path("removal-dee.shard-1.json").rename("first.json")
    Path("removal-dee.shard-1.pem").unlink()
    run("publish", "dee.shard-1", *connected)
    run("request-removal", *connected, "--yes", "-o", "both.json", code=2)
    run("request-removal", *connected, answer="y\n")
    assert Registry("registry").clients == ("ada", "ben", "cho")
    for number in (0, 1):
        record = Path(f"removal-dee.shard-{number}.json")
        assert RemovalRecord.parse(record.read_bytes(), source="x").client == record.stem[8:]
