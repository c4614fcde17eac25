"""Flower's real engine, killed by SIGKILL while clients train, and started again."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest
from engine_runs import BIN, LIMIT, QUICK

from fedcompo.engine.guard import GRACE
from fedcompo.registry.registry import Registry
from fedcompo.registry.verification import verify_registry

pytestmark = [pytest.mark.simulation, pytest.mark.slow]


def simulate(cwd: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [BIN / "fedcompo", "simulate", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def answered(output: Path, phase: str) -> list[dict]:
    """Events of clients whose answer in a phase was folded in."""
    file = output / "events.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return [e for e in events if e["event"] == "client" and e["phase"] == phase]


def test_a_killed_run_goes_on_without_training_anyone_again(tmp_path):
    output = tmp_path / "run"
    settings = {**QUICK, "in-flight": 1, "local-epochs": 100}  # what ends it takes a few seconds
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    first = simulate(tmp_path, "--output", str(output), *options)
    deadline = time.monotonic() + LIMIT
    while not answered(output, "train") and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    first.kill()
    first.communicate()
    time.sleep(2 * GRACE)
    assert answered(output, "train"), "the run ended before anyone had trained"
    assert not (output / "results.json").exists()

    second = simulate(tmp_path, "--resume", str(output))
    said, _ = second.communicate(timeout=LIMIT)

    assert second.returncode == 0, said
    assert said.splitlines()[-1] == f"Results: {output}"
    reasons = [event["reason"] for event in answered(output, "train")]
    assert len(reasons) == QUICK["num-tasks"]
    assert "answered before the interruption" in reasons
    assert (output / "events-1.jsonl").exists()
    assert not (output / "answers").exists()
    registry = Registry(output / "registry")
    assert len(registry.clients) == QUICK["num-tasks"]
    assert all(finding.holds is not False for finding in verify_registry(registry.path))
