"""What ``fedcompo init-deployment`` writes: for whom, readable by whom; what it leaves alone."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cli_runs import run
from cryptography import x509
from cryptography.x509.oid import NameOID

from fedcompo.deployment import folders, given_app
from fedcompo.deployment.plan import Deployment
from fedcompo.engine.launcher import find_app
from fedcompo.errors import ConfigError, ContributionError, LaunchError
from fedcompo.service.authority import Authority

SECRETS = ("*.key", "supernode")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A deployment, written once, and what the command printed."""
    folder = tmp_path_factory.mktemp("deployment") / "fed"
    plan = ["--server", "fed.example.org", "--clients", "a, b,c"]
    done = run("init-deployment", folder, *plan, "--with-keys")
    assert "for trials alone" in done.output
    return folder, done.output


@pytest.fixture
def written(original: tuple[Path, str], tmp_path: Path) -> Path:
    """A deployment to do something to."""
    return Path(shutil.copytree(original[0], tmp_path / "fed"))


def contents(folder: Path) -> dict[str, str]:
    """Digest of each file by its path."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def secrets(folder: Path) -> list[Path]:
    return [file for pattern in SECRETS for file in folder.rglob(pattern)]


# What is there.


def test_each_client_gets_a_folder_that_needs_no_other(original: tuple[Path, str]) -> None:
    for name in ("a", "b", "c"):
        client = original[0] / "clients" / name
        found = {file.split("/")[0] for file in contents(client)}
        assert found == {
            "README.md", "app.sha256", "certificates", "client.conf", "flower", "library.sha256",
            "registry", "start", "systemd",
        }  # fmt: skip
        assert {file.name for file in (client / "certificates").iterdir()} == {
            "ca.crt", "client.crt", "client.key", "holder.json", "supernode",
        }  # fmt: skip
        assert not [file for file in client.rglob("*") if file.is_symlink()]


def test_the_settings_of_a_client_are_data_device_kind_and_limits(
    original: tuple[Path, str],
) -> None:
    lines = (original[0] / "clients" / "b" / "client.conf").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert settings == {
        "DATA": "/data/b",
        "DEVICE": "auto",
        "KIND": "",
        "CAPS": "",
        "THREADS": "4",
        "PORT": "9094",
    }


def test_an_earlier_plan_with_a_name_that_is_not_free_any_more_is_a_sentence(
    tmp_path: Path,
) -> None:
    Deployment("localhost", ("a", "b")).save(tmp_path)
    plan = tmp_path / "deployment.json"
    plan.write_text(plan.read_text().replace('"b"', '"server"'))
    said = run("init-deployment", tmp_path, "--renew", "a", code=1).stderr
    assert "'server' is not free to name a client" in said and "is no deployment" not in said


def test_certificates_say_who_their_holders_are(original: tuple[Path, str]) -> None:
    folder = original[0]
    ca = x509.load_pem_x509_certificate((folder / "authority" / "ca.crt").read_bytes())
    holders = {"operator/operator.crt": ("operator", "operator")} | {
        f"clients/{name}/certificates/client.crt": ("client", name) for name in ("a", "b", "c")
    }
    holders["server/certificates/server.crt"] = ("server", "server")
    for file, expected in holders.items():
        certificate = x509.load_pem_x509_certificate((folder / file).read_bytes())
        certificate.verify_directly_issued_by(ca)
        said = {part.oid: part.value for part in certificate.subject}
        unit, name = said[NameOID.ORGANIZATIONAL_UNIT_NAME], said[NameOID.COMMON_NAME]
        assert (unit, name) == expected
        trusted = (folder / file).with_name("ca.crt")
        assert trusted.read_bytes() == (folder / "authority" / "ca.crt").read_bytes()


def test_the_app_of_the_server_is_the_one_that_clients_were_given(
    original: tuple[Path, str], tmp_path: Path
) -> None:
    folder = original[0]
    given_app.give(folder / "server" / "app", tmp_path)
    assert contents(tmp_path) == contents(folder / "given")
    (unpacked,) = (folder / "clients" / "a" / "flower" / "apps").iterdir()
    for file in ("clients/app.py", "server/app.py"):
        assert (unpacked / file).read_bytes() == (find_app() / file).read_bytes()


def test_sha256sum_agrees_with_the_digests(original: tuple[Path, str]) -> None:
    client = original[0] / "clients" / "a"
    library = Path(given_app.__file__).parents[1]
    for digests, folder in ((client / "app.sha256", client), (client / "library.sha256", library)):
        assert len(digests.read_text().splitlines()) > 10
        checked = subprocess.run(
            ["sha256sum", "--check", "--strict", "--quiet", digests], cwd=folder, check=False
        )
        assert checked.returncode == 0


def test_the_library_is_its_sources_its_templates_and_its_weights(tmp_path: Path) -> None:
    library = tmp_path / "_app" / "fedcompo"
    for name in (
        "errors.py", "deployment/plan.py", "deployment/templates/client/start.sh",
        "report/templates/page.html", "assets/weights.safetensors",
        "_app/clients/app.py", "__pycache__/errors.pyc", "py.typed",
    ):  # fmt: skip
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text("x")
    files = [file for file in given_app.library_files(library) if file.is_file()]
    assert {file.relative_to(library).as_posix() for file in files} == {
        "errors.py", "deployment/plan.py", "deployment/templates/client/start.sh",
        "report/templates/page.html", "assets/weights.safetensors",
    }  # fmt: skip


# Who can read it.


def test_private_keys_are_their_owners_alone(original: tuple[Path, str]) -> None:
    folder = original[0]
    found = secrets(folder)
    # The authority, the server, the operator, and two keys a client.
    assert len(found) == 3 + 2 * 3
    assert {stat.S_IMODE(file.stat().st_mode) for file in found} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for file in folder.rglob("*"):
        if file.is_file() and file not in found:
            assert b"PRIVATE KEY" not in file.read_bytes(), file


def test_nobody_gets_a_key_of_somebody_else(original: tuple[Path, str]) -> None:
    folder = original[0]
    digests = [hashlib.sha256(file.read_bytes()).digest() for file in secrets(folder)]
    assert len(set(digests)) == len(digests)
    assert [file.name for file in secrets(folder / "server")] == ["server.key"]


def test_nothing_secret_is_printed(original: tuple[Path, str]) -> None:
    folder, printed = original
    assert "Wrote" in printed
    assert "PRIVATE" not in printed
    for file in secrets(folder):
        for line in file.read_text().splitlines():
            assert line not in printed


# Adding, and not writing over.


def test_a_second_call_refuses_and_changes_nothing(written: Path) -> None:
    before = contents(written)
    done = run("init-deployment", written, "--server", "x.org", "--clients", "a", code=2)
    assert "exists and holds something; nothing was changed" in done.stderr
    assert f"init-deployment {written} --add" in done.stderr
    assert contents(written) == before


def test_a_client_that_is_added_touches_no_other(written: Path) -> None:
    before = contents(written)
    done = run("init-deployment", written, "--add", "d", "--with-keys")
    assert "PRIVATE" not in done.output
    after = contents(written)
    changed = {file for file in before if after.get(file) != before[file]}
    assert changed == {"deployment.json"}
    new = {file for file in after if file not in before}
    assert {file for file in new if not file.startswith("clients/d/")} == {"server/clients/d.pub"}
    assert json.loads((written / "deployment.json").read_text())["clients"] == ["a", "b", "c", "d"]
    a, d = (contents(written / "clients" / name) for name in ("a", "d"))
    assert {file.replace("-d.", "-a.") for file in d} == set(a)
    assert a["app.sha256"] == d["app.sha256"]
    assert a["client.conf"] != d["client.conf"]
    certificate = written / "clients" / "d" / "certificates" / "client.crt"
    ca = Authority.load(written / "authority" / "ca.crt", written / "authority" / "ca.key")
    x509.load_pem_x509_certificate(certificate.read_bytes()).verify_directly_issued_by(
        x509.load_pem_x509_certificate(ca.credential.certificate)
    )


@pytest.mark.parametrize(
    ("name", "why", "code"),
    [
        ("a", "in the deployment already", 2),
        ("A", "could be mistaken", 1),
        ("../d", "cannot be", 1),
    ],
)
def test_a_client_that_cannot_be_added_leaves_no_trace(
    written: Path, name: str, why: str, code: int
) -> None:
    before = contents(written)
    assert why in run("init-deployment", written, "--add", name, code=code).stderr
    assert contents(written) == before


def test_an_update_gives_everyone_the_same_new_app_and_changes_no_key(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Earlier versions wrote Docker's files, too; they are left alone.
    for place in ("server", "clients/a"):
        (written / place / "compose.yaml").write_text("services:\n")
    with (written / "clients" / "a" / "client.conf").open("a") as settings:
        settings.write("MEMORY=32g\n")
    before = contents(written)
    given = before["clients/a/app.sha256"]
    app = tmp_path / "app"
    given_app.copy_app(find_app(), app)
    with (app / "clients" / "app.py").open("a") as file:
        file.write("# another version\n")
    monkeypatch.setattr("fedcompo.engine.launcher.find_app", lambda: app)
    for folder in (written / "clients" / "b" / "flower").rglob("*"):
        folder.chmod(folder.stat().st_mode & ~0o222)  # as it is after a start
    printed = run("init-deployment", written, "--update").output
    after = contents(written)
    changed = {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)}
    parts = (
        "given/",
        "server/app/",
        *(f"clients/{n}/{p}" for n in "abc" for p in ("flower/", "app.")),
    )
    assert all(file.startswith(parts) for file in changed), changed
    assert after["server/app/clients/app.py"] != before["server/app/clients/app.py"]
    assert len({after[f"clients/{name}/app.sha256"] for name in "abc"} | {given}) == 2
    for name in "abc":
        client = written / "clients" / name
        assert not (client / ".flower.old").exists()
        assert str(client) in printed
        (unpacked,) = (client / "flower" / "apps").iterdir()
        assert (unpacked / "clients" / "app.py").read_text().endswith("# another version\n")
        checked = ["sha256sum", "--check", "--strict", "--quiet", "app.sha256"]
        assert subprocess.run(checked, cwd=client, check=False).returncode == 0
    assert not [
        file for file in written.rglob(".*") if file.name.startswith((".update", ".flower"))
    ]


def test_an_update_that_fails_changes_nothing(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(written)
    assert (
        "no other option"
        in run("init-deployment", written, "--update", "--add", "d", code=2).stderr
    )

    def refuse(app: Path, folder: Path) -> None:
        raise LaunchError("no bundle today")

    monkeypatch.setattr(given_app, "give", refuse)
    assert "no bundle" in run("init-deployment", written, "--update", code=1).stderr
    assert contents(written) == before
    assert (
        "is no deployment" in run("init-deployment", written / "given", "--update", code=1).stderr
    )


def test_an_update_changes_no_port(written: Path) -> None:
    before = contents(written)
    said = run("init-deployment", written, "--update", "--port", "9999", code=2).stderr
    assert "no other option" in said
    assert contents(written) == before


def test_where_nothing_was_written_nobody_can_be_added(tmp_path: Path) -> None:
    assert "is no deployment" in run("init-deployment", tmp_path, "--add", "d", code=1).stderr


def test_what_fails_half_way_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(app: Path, folder: Path) -> None:
        raise LaunchError("no bundle today")

    monkeypatch.setattr(given_app, "give", refuse)
    with pytest.raises(LaunchError, match="no bundle"):
        folders.create(tmp_path / "fed", Deployment("x.org", ("a",)), find_app())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_empty_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given_app, "give", lambda app, folder: folder.mkdir())
    folders.create(tmp_path, Deployment("x.org", ("a",)), find_app())
    assert (tmp_path / "deployment.json").is_file()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--clients", "a"], "needs `--server HOST`"),
        (["--server", "x.org"], "needs `--server HOST`"),
        (["--server", "https://x.org", "--clients", "a"], "neither a DNS name nor an IP"),
        (["--server", "x.org", "--clients", "a,,b"], "no list of clients"),
        (["--server", "x.org", "--clients", "a,a"], "named twice"),
        (["--server", "x.org", "--clients", "a b"], "cannot name a service"),
        (["--server", "x.org", "--clients", "a", "--port", "8000"], "cannot share one"),
        (["--server", "x.org", "--clients", "a", "--port", "9443"], "cannot share one"),
        (["--server", "x.org", "--clients", "a", "--port", "0"], "no port"),
        (["--server", "x.org", "--clients", "a", "--registry-port", "70000"], "no port"),
        (["--server", "x.org", "--add", "a"], "leave out `--server`"),
    ],
)
def test_what_cannot_be_deployed_is_refused(tmp_path: Path, options: list[str], why: str) -> None:
    assert why in run("init-deployment", tmp_path / "fed", *options, code=2).stderr
    assert list(tmp_path.iterdir()) == []


def test_a_deployment_without_its_authority_takes_nobody(written: Path) -> None:
    shutil.rmtree(written / "authority")
    before = contents(written)
    with pytest.raises(ConfigError, match=r"certificate .*ca.crt cannot be read"):
        folders.add(written, "d")
    assert contents(written) == before


def test_names_that_resemble_each_other_are_refused() -> None:
    with pytest.raises(ContributionError, match="could be mistaken"):
        Deployment("x.org", ("hospital-1", "hospital-l"))
    with pytest.raises(ConfigError, match="needs a client"):
        Deployment("x.org", ())


def test_an_ipv6_address_stands_in_brackets_before_the_port() -> None:
    assert Deployment("2001:db8::7", ("a",)).address == "[2001:db8::7]:8443"
    assert Deployment("192.0.2.7", ("a",), port=443).address == "192.0.2.7:443"
