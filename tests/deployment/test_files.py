"""Files that a deployment is started with: scripts, systemd units, Compose files."""

from __future__ import annotations

import configparser
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from fedcompo.deployment import folders
from fedcompo.deployment.plan import Deployment
from fedcompo.deployment.proxy import nginx_conf
from fedcompo.deployment.templates import fill, write_files
from fedcompo.deployment.units import server_units
from fedcompo.engine.launcher import find_app


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
            checked = subprocess.run(["sh", "-n", file], capture_output=True, check=False)
            assert checked.returncode == 0, checked.stderr
    assert found == {
        "start", "registry", "start-superlink", "start-proxy", "start-registry", "register", "run",
    }  # fmt: skip


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
        assert int(service["RestartSec"]) >= (5 if "server" in home.parts else 55), name
        assert service["LimitCORE"] == service["MemorySwapMax"] == "0"
        assert service["NoNewPrivileges"] == "yes"
        assert service["User"] != "root"


@pytest.mark.parametrize(("port", "needed"), [(443, "CAP_NET_BIND_SERVICE"), (8443, "")])
def test_the_proxy_has_one_right_more_where_its_port_needs_it(port: int, needed: str) -> None:
    units = server_units(Deployment("x.org", ("a",), port=port))
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


def test_compose_files_call_the_same_scripts_and_publish_proxy_and_registry_alone(
    written: Path,
) -> None:
    folder = written
    client = yaml.safe_load((folder / "clients" / "a" / "compose.yaml").read_text())
    server = yaml.safe_load((folder / "server" / "compose.yaml").read_text())
    services = {**client["services"], **server["services"]}
    commands = {name: service["command"] for name, service in services.items()}
    assert commands == {
        "client": ["/client/start"],
        "superlink": ["/server/start-superlink"],
        "proxy": ["/server/start-proxy"],
        "registry": ["/server/start-registry"],
    }
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports == ["8443:8443", "9443:9443"]
    assert services["registry"]["profiles"] == ["registry"], "there is none before the first run"
    for name, service in services.items():
        assert service["restart"] == "always"
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert ".:/client:ro" in service["volumes"] or ".:/server:ro" in service["volumes"]
        if name not in ("proxy", "registry"):  # the registry's image is the SuperLink's
            assert "PROJECT" in service["build"]["context"]
    gpu = yaml.safe_load((folder / "clients" / "a" / "compose.gpu.yaml").read_text())
    assert set(gpu["services"]) <= set(client["services"])


def test_a_template_without_its_value_is_an_error(tmp_path: Path) -> None:
    assert fill("$HOME/@{name}", name="a") == "$HOME/a"
    with pytest.raises(KeyError):
        fill("@{name}")
    write_files(tmp_path, {"x": "1"})
    with pytest.raises(FileExistsError):
        write_files(tmp_path, {"x": "2"})


def test_no_place_of_a_template_is_left_open(written: Path) -> None:
    for file in written.rglob("*"):
        if file.is_file() and file.suffix in ("", ".conf", ".md", ".yaml", ".service"):
            assert "@{" not in file.read_text(), file


@pytest.mark.parametrize(
    ("host", "listens"), [("fed.example.org", False), ("192.0.2.7", False), ("2001:db8::7", True)]
)
def test_the_proxy_wants_ipv6_only_where_its_address_is_one(host: str, listens: bool) -> None:
    lines = [line.strip() for line in nginx_conf(Deployment(host, ("a",))).splitlines()]
    assert ("listen [::]:8443 ssl;" in lines) is listens
    assert "listen 8443 ssl;" in lines
