"""Files that a deployment is started with: templates, scripts, systemd units."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import stat
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from fedcompo.deployment import folders
from fedcompo.deployment.contents import server_files
from fedcompo.deployment.plan import Deployment
from fedcompo.deployment.templates import PLACE, TEMPLATES, fill, write_files
from fedcompo.engine.launcher import find_app
from fedcompo.errors import ConfigError, FedcompoError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deployment") / "fed"
    folders.create(folder, Deployment("fed.example.org", ("a", "b", "c")), find_app())
    return folder


def test_scripts_are_scripts_and_nothing_else_is(written: Path) -> None:
    found = set()
    for file in written.rglob("*"):
        if file.is_file() and file.stat().st_mode & stat.S_IXUSR:
            found.add(file.name)
    assert found == {
        "start", "registry", "start-superlink", "start-proxy", "start-registry", "register", "run",
    }  # fmt: skip


def test_shells_read_every_script_and_shellcheck_finds_no_fault(written: Path) -> None:
    scripts = [file for file in written.rglob("*") if file.is_file() and os.access(file, os.X_OK)]
    scripts.append(written / "server" / "environment")
    assert len(scripts) == 7 + 2 * 3
    commands = [["sh", "-n"], ["bash", "-n"]]
    if shutil.which("shellcheck"):
        commands.append(["shellcheck", "--shell=sh", "--external-sources"])
    for script in scripts:
        for command in commands:
            checked = subprocess.run(
                [*command, script], cwd=script.parent, capture_output=True, text=True, check=False
            )
            assert checked.returncode == 0, checked.stdout + checked.stderr


def test_shellcheck_reads_templates_as_they_are() -> None:
    tool = shutil.which("shellcheck")
    if tool is None:
        pytest.skip("shellcheck is not installed")
    # What a script sources stands beside it in a deployment alone.
    command = [tool, "--shell=sh", "--exclude=SC1091", *TEMPLATES.rglob("*.sh")]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_no_program_calls_home_or_installs(written: Path) -> None:
    for script in (written / "clients" / "a" / "start", written / "server" / "environment"):
        lines = script.read_text().splitlines()
        for line in (
            "export FLWR_TELEMETRY_ENABLED=0",
            "export FLWR_DISABLE_UPDATE_CHECK=1",
            "export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1",
            "export RAY_USAGE_STATS_ENABLED=0",
        ):
            assert line in lines


def test_units_start_the_scripts_again_after_a_session_has_expired(
    written: Path,
) -> None:
    folder = written
    units = {file.stem: file for file in folder.rglob("systemd/*.service")}
    assert sorted(units) == [
        "fedcompo-a", "fedcompo-b", "fedcompo-c", "fedcompo-proxy", "fedcompo-registry",
        "fedcompo-superlink",
    ]  # fmt: skip
    for name, file in units.items():
        unit = configparser.ConfigParser(strict=True, interpolation=None)
        unit.optionxform = str  # type: ignore[method-assign, assignment]
        unit.read_string(file.read_text())
        service = unit["Service"]
        home = Path(service["WorkingDirectory"])
        script = Path(service["ExecStart"]).relative_to(home)
        assert (file.parents[1] / script).stat().st_mode & stat.S_IXUSR
        assert home == Path("/opt/fedcompo") / file.parents[1].name
        assert service["Restart"] == "always"
        assert service["RestartPreventExitStatus"] == "78", "see refuse() in a client's start"
        assert int(service["RestartSec"]) >= (5 if "server" in home.parts else 55), name
        assert service["LimitCORE"] == service["MemorySwapMax"] == "0"
        assert service["NoNewPrivileges"] == "yes"
        assert service["User"] != "root"


@pytest.mark.parametrize(("port", "needed"), [(443, "CAP_NET_BIND_SERVICE"), (8443, "")])
def test_the_proxy_has_one_right_more_where_its_port_needs_it(port: int, needed: str) -> None:
    units = server_files(Deployment("x.org", ("a",), port=port))
    lines = units["systemd/fedcompo-proxy.service"].splitlines()
    assert f"CapabilityBoundingSet={needed}" in lines
    assert f"AmbientCapabilities={needed}" in lines
    assert "CapabilityBoundingSet=" in units["systemd/fedcompo-superlink.service"].splitlines()


def test_systemd_finds_no_fault_with_the_units(written: Path) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd is not installed")
    for file in written.rglob("systemd/*.service"):
        done = subprocess.run([tool, "verify", file], capture_output=True, text=True, check=False)
        assert "Unknown" not in done.stderr, done.stderr


def test_a_template_without_its_value_is_an_error(tmp_path: Path) -> None:
    assert fill('$HOME/@NAME@@NAME@ "$@" a@b.org', {"name": "a"}) == '$HOME/aa "$@" a@b.org'
    with pytest.raises(KeyError, match="name"):
        fill("@NAME@", {"port": 1})
    write_files(tmp_path, {"x": "1"})
    with pytest.raises(FileExistsError):
        write_files(tmp_path, {"x": "2"})


@pytest.mark.parametrize("mark", ["'", '"', "$", "%", "\n", "\\", ";", "`", "/", "{", " x", "é"])
def test_what_means_something_to_a_shell_nginx_or_systemd_is_refused(mark: str) -> None:
    for host in (f"x{mark}org", f"fe80::1{mark}eth0", f"fe80::1%eth0{mark}reboot"):
        with pytest.raises(ConfigError, match="neither a DNS name nor an IP address"):
            Deployment(host, ("a",))
    with pytest.raises(FedcompoError, match=r"cannot (be a client's name|name a service)"):
        Deployment("x.org", (f"a{mark}b",))


def test_a_deployment_that_was_edited_is_checked(tmp_path: Path) -> None:
    good = Deployment("x.org", ("a",))
    for changed in ({"server": "x;y"}, {"server": 5}, {"port": "1; x"}, {"port": 8443.5}):
        (tmp_path / "deployment.json").write_text(json.dumps(asdict(good) | changed))
        with pytest.raises(FedcompoError, match=r"is no deployment|cannot be used"):
            Deployment.load(tmp_path)


@pytest.mark.parametrize("mark", ['"', "\\"])
def test_a_place_that_settings_cannot_name_is_refused(tmp_path: Path, mark: str) -> None:
    place = tmp_path / f"a{mark}b"
    write_files(place, server_files(Deployment("x.org", ("a",))))
    done = subprocess.run([place / "start-superlink"], capture_output=True, text=True, check=False)
    assert done.returncode == 78 and "double quote or a backslash" in done.stderr


def texts(folder: Path) -> dict[Path, str]:
    """What was made of templates, by path."""
    files = [*folder.glob("*"), *folder.glob("[cos]*/*"), *folder.glob("clients/*/*")]
    files += folder.glob("**/systemd/*")
    return {file: file.read_text() for file in files if file.is_file() and file.suffix != ".key"}


def test_no_place_of_a_template_is_left_open(written: Path) -> None:
    for file, text in texts(written).items():
        assert not PLACE.search(text), file


def test_every_template_is_used(written: Path) -> None:
    lines = [set(text.splitlines()) for text in texts(written).values()]
    templates = [file for file in TEMPLATES.rglob("*") if file.is_file()]
    assert len(templates) > 10
    for template in templates:
        fixed = {line for line in template.read_text().splitlines() if not PLACE.search(line)}
        assert any(fixed <= written for written in lines), template


@pytest.mark.parametrize(
    ("host", "listens"), [("fed.example.org", False), ("192.0.2.7", False), ("2001:db8::7", True)]
)
def test_the_proxy_wants_ipv6_only_where_its_address_is_one(host: str, listens: bool) -> None:
    lines = [
        line.strip() for line in server_files(Deployment(host, ("a",)))["nginx.conf"].splitlines()
    ]
    assert ("listen [::]:8443 ssl;" in lines) is listens
    assert "listen 8443 ssl;" in lines
