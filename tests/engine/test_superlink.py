"""The engine's surroundings: environment, folder, log; whole runs are in test_launcher.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from flwr.cli.build import build_fab_from_disk
from tiny_app import write_app

from fedcompo.engine import control
from fedcompo.engine import superlink as engine
from fedcompo.engine.log import LineTail, last_error
from fedcompo.errors import LaunchError

LOG = """\
\x1b[92mINFO \x1b[0m:      Starting Flower Simulation
\x1b[91mERROR \x1b[0m:     Simulation raised an exception
Traceback (most recent call last):
  File "app.py", line 16, in main
RuntimeError: the dog ate it
\x1b[91mERROR \x1b[0m:     Exit Code: 700

An unhandled exception occurred when running the simulation.

For more information, visit: <https://flower.ai/>
\x1b[92mINFO \x1b[0m:      Finished task 8179 of run 1565
2026-11-21T01:48:49.467Z INFO [uvicorn.access] 127.0.0.1:47950 - "POST /v1" 200
"""


def test_the_last_error_is_the_traceback_without_the_noise() -> None:
    assert last_error(LOG).splitlines() == [
        "  Traceback (most recent call last):",
        '    File "app.py", line 16, in main',
        "  RuntimeError: the dog ate it",
    ]


def test_without_a_traceback_the_last_error_is_the_end_of_the_log() -> None:
    assert last_error("one\ntwo\n\nthree\n", lines=2) == "  two\n  three"


def test_a_line_tail_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    file = tmp_path / "log"
    tail = LineTail(file)
    assert tail.read() == []
    with file.open("wb", buffering=0) as stream:
        stream.write("eins\nzw\u00f6".encode()[:-1])  # cut within a character
        assert tail.read() == ["eins"]
        stream.write("\u00f6".encode()[-1:] + b"lf\n")
        assert tail.read() == ["zw\u00f6lf"]
        assert tail.read() == []


def test_the_environment_closes_the_traps_and_keeps_the_rest(tmp_path: Path) -> None:
    user = {"PATH": "/usr/bin", "HF_HUB_OFFLINE": "1", "RAY_ADDRESS": "1.2.3.4", "NO_PROXY": "a.b"}
    environment = engine._environment(tmp_path, user)
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert "RAY_ADDRESS" not in environment
    assert environment["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "/usr/bin"]
    assert environment["NO_PROXY"] == "a.b,127.0.0.1,localhost,::1"
    assert environment["FLWR_HOME"] == str(tmp_path / "home")
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert "HF_HUB_OFFLINE" not in engine._environment(tmp_path, {})


@pytest.mark.parametrize(
    ("proxy", "kept"),
    [
        ("http://house:3128", True),
        ("house:3128", True),
        ("https://a:b@house:3128", True),
        ("", True),
        ("socks://house:1080", False),
        ("http://house:port", False),
        ("http://[::1", False),
    ],
)
def test_flowers_client_starts_whatever_proxies_there_are(proxy, kept, tmp_path, monkeypatch):
    names = [f"{kind}_proxy" for kind in ("http", "https", "grpc", "all", "HTTP", "ALL")]
    user = dict.fromkeys(names, proxy) | {"no_proxy": "a.b,[::1]", "NO_PROXY": ""}
    environment = engine._environment(tmp_path, user)
    assert all((environment.get(name) == proxy) is kept for name in names)
    for key in user:
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with httpx.Client() as client:
        for url in ("http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1"):
            assert client._transport_for_url(httpx.URL(url)) is client._transport


def test_two_engines_carry_different_markers(tmp_path: Path) -> None:
    one, other = (engine._environment(tmp_path, {})[engine.MARKER] for _ in range(2))
    assert one != other


def test_the_engine_finds_this_library_and_not_the_checkout_around_it(tmp_path: Path) -> None:
    if not engine._must_be_linked():
        pytest.skip("the library is installed")
    engine._write_files(tmp_path)
    environment = engine._environment(tmp_path, os.environ)
    where = subprocess.run(
        [sys.executable, "-c", "import fedcompo.errors as e; print(e.__file__)"],
        cwd=tmp_path / "cwd",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert Path(where).resolve() == Path(engine.__file__).resolve().parents[1] / "errors.py"
    assert [entry.name for entry in (tmp_path / "library").iterdir()] == ["fedcompo"]


@pytest.mark.parametrize("names_its_files", [True, False])
def test_an_app_is_bundled_as_flower_bundles_it(names_its_files: bool, tmp_path: Path) -> None:
    app = write_app(tmp_path / "app", "raise")
    (app / "LICENSE").write_text("Free.")
    (app / ".gitignore").write_text("secret.py")
    for name in ("secret.py", "tiny_server/secret.py", "other.py"):
        (app / name).touch()
    if names_its_files:
        project = (app / "pyproject.toml").read_text()
        named = 'publisher = "tests"\nfab-include = ["tiny_*/**/*.py"]'
        (app / "pyproject.toml").write_text(project.replace('publisher = "tests"', named))
    assert control.bundled(app) == build_fab_from_disk(app)


def test_a_missing_program_is_named_with_its_remedy() -> None:
    with pytest.raises(LaunchError, match=r"`flower-superlink` .*pip install"):
        engine.program("flower-superlink", {"PATH": "/nowhere"})


def test_a_long_temporary_folder_is_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/var/folders/" + "x" * 40)
    assert engine._temporary() == "/tmp"


@pytest.mark.simulation
def test_a_superlink_that_does_not_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_free_port", lambda: 99_999)
    with (
        pytest.raises(LaunchError, match=r"(?s)did not start.*99999|port"),
        engine.started(tmp_path / "log", write_app(tmp_path / "app", "raise"), {}, {}),
    ):
        pass
