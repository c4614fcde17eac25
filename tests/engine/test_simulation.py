"""The main job on Flower's real engine, started as a user would."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from engine_runs import AWKWARD, BIN, LIMIT, QUICK, SECRET, SHARED
from golden import figures_of, nearly

from fedcompo import simulate
from fedcompo.method.contribution import Contribution
from fedcompo.registry.registry import Registry

pytestmark = pytest.mark.simulation

CHECKOUT = Path(__file__).resolve().parents[2]
DIGITS = CHECKOUT / "tests" / "golden" / "digits.json"


def test_simulate_leaves_results_where_the_last_line_says(simulated):
    done = simulated.command
    assert done.returncode == 0, done.stderr + done.stdout
    said = done.stdout.splitlines()[-1]
    output = Path(said.removeprefix("Results: "))
    assert output == simulated.folder / "here" / AWKWARD == simulated.output
    results = json.loads((output / "results.json").read_text())
    assert results["settings"]["rank"] == 2
    assert list(results["per_client"]) == ["hospital-a", "hospital-b"]
    assert f"{100 * results['class_il_accuracy']:.1f}" in done.stdout
    assert (output / "registry" / "model" / "config.json").exists()
    assert (output / "report.html").exists()
    for client in results["per_client"]:
        assert Contribution.open(output / "registry" / "clients" / client).client == client


def test_the_engine_in_this_process_gives_the_same_bits(simulated, tmp_path):
    settings = {**SHARED, "data": f"folder:{simulated.folder / 'images'}"}
    output = tmp_path / "run"
    results = simulate(settings, output=output, engine="in-process", check=False)
    others = json.loads((simulated.output / "results.json").read_text())
    assert figures_of(results) == figures_of(others)
    roots = {Registry(path / "registry").state.root for path in (output, simulated.output)}
    assert len(roots) == 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["flower", "in-process"])
def test_the_default_run_gives_the_figures_it_always_gave(tmp_path, engine):
    done = subprocess.run(
        [BIN / "fedcompo", "simulate", "--engine", engine, "--output", tmp_path / "digits"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    results = json.loads((tmp_path / "digits" / "results.json").read_text())
    assert figures_of(results) == nearly(json.loads(DIGITS.read_text()))


def test_what_a_client_s_files_are_called_stands_in_its_own_log_alone(simulated):
    done, output = simulated.command, simulated.output
    (left_out,) = json.loads((output / "results.json").read_text())["left_out"]
    assert left_out["reason"].startswith("DataError: 2 image(s) of class '0' cannot")
    assert left_out["reason"] in (output / "flower.log").read_text()
    logs = {path.stem: path.read_text() for path in (output / "clients").iterdir()}
    assert set(logs) <= {"hospital-a", "hospital-b", "hospital-c"}
    assert f"that are not read: {SECRET}." in logs["hospital-a"]
    assert f"{SECRET}.jpg" in logs["hospital-c"]
    assert f"{SECRET}.png" in logs["hospital-c"]
    others = [p for p in output.rglob("*") if p.is_file() and p.parent.name != "clients"]
    assert {"results.json", "events.jsonl", "flower.log"} <= {path.name for path in others}
    assert not [path for path in others if SECRET.encode() in path.read_bytes()]
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.slow
def test_plain_flwr_run_works_too(tmp_path):
    """As documented: no launcher, a SuperLink for simulations, `flwr run` with its own options."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "here"\n\n'
        f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    output = tmp_path / "out"
    values = {**QUICK, "output": str(output)}
    config = " ".join(
        f'{key}="{value}"' if key == "output" else f"{key}={value}" for key, value in values.items()
    )
    link = subprocess.Popen(
        [
            *(
                sys.executable,
                CHECKOUT / "fedcompo" / "engine" / "guard.py",
                home,
                BIN / "flower-superlink",
            ),
            *("--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)),
        ],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=(tmp_path / "superlink.log").open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        _wait_for(port)
        done = subprocess.run(
            [
                *(BIN / "flwr", "run", CHECKOUT, "here", "--stream", "--run-config", config),
                *("--federation-config", "num-supernodes=2 client-resources-num-cpus=2"),
            ],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        results = output / "results.json"
        assert results.exists(), done.stdout + done.stderr
        found = json.loads(results.read_text())
        assert found["left_out"] == []
        assert found["realigned_with"] == ["client-0", "client-1"]
    finally:
        link.terminate()
        link.wait(60)


def _wait_for(port: int) -> None:
    import time

    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError("The SuperLink did not start.")
