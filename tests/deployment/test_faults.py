"""What fails on separate machines, made to fail: processes killed, networks cut, clients that hang.

Minutes each, most of which Flower needs to notice; run by ``pytest --slow``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployed_federation import DIGITS, QUICK, DeployedFederation, deployed, digits_as_folders

pytestmark = [pytest.mark.simulation, pytest.mark.slow]

SETTINGS = {**QUICK, "min-clients": 2, "timeout": 240.0}
PATIENCE = 120.0
"""Seconds until a client that was killed is let in again."""
SOON = 300.0
"""Seconds in which a phase is over."""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeployedFederation]:
    images = digits_as_folders(tmp_path_factory.mktemp("images"), DIGITS, training=10, test=12)
    with deployed(tmp_path_factory.mktemp("federation"), images) as started:
        started.start_server()
        yield started


@pytest.fixture(autouse=True)
def everyone(federation: DeployedFederation) -> None:
    """All clients are there when a test begins."""
    for client in DIGITS:
        known = federation.clients.get(client)
        if known is None or not known.alive:
            federation.start_client(client, patience=PATIENCE)


def again(federation: DeployedFederation) -> dict:
    """Settings that go on with the last run."""
    federation.runs -= 1
    return {**SETTINGS, "resume": True}


def kill(federation: DeployedFederation, program: str) -> None:
    """SIGKILL to one program of the federation, found by its name."""
    for pid in federation.left_over():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if any(word.endswith(program.encode()) for word in words[:2]):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("after", ["has started", "features: 3 client(s)", "fisher: 3 client(s)"])
def test_a_client_killed_in_any_phase_is_left_out_by_name(federation, after):
    run = federation.submit(SETTINGS)
    run.wait_for(after, SOON)
    federation.clients["hospital-c"].kill()
    done = federation.finish(run)
    assert done.code == 0, done.said
    results = done.results
    assert results["registry"]["joined"] == ["hospital-a", "hospital-b"]
    if after != "has started":  # before, it may never have been seen
        assert [one["client"] for one in results["left_out"]] == ["hospital-c"]


def test_a_client_that_hangs_is_left_out_after_the_timeout(federation):
    run = federation.submit({**SETTINGS, "timeout": 60.0})
    run.wait_for("features: 3 client(s)", SOON)
    federation.clients["hospital-c"].pause()
    try:
        done = federation.finish(run)
    finally:
        federation.clients["hospital-c"].resume()
    assert done.code == 0, done.said
    (left_out,) = done.results["left_out"]
    assert left_out["client"] == "hospital-c"


def test_a_network_cut_of_thirty_seconds_is_survived(federation):
    run = federation.submit(SETTINGS)
    run.wait_for("features: 3 client(s)", SOON)
    federation.cut("hospital-c")
    time.sleep(30)
    federation.heal("hospital-c")
    done = federation.finish(run)
    assert done.code == 0, done.said
    assert done.results["left_out"] == []
    assert done.results["registry"]["joined"] == list(DIGITS)


@pytest.mark.parametrize("after", ["features: 3 client(s)", "train: 3 client(s)"])
def test_a_server_app_that_was_killed_goes_on(federation, after):
    run = federation.submit(SETTINGS)
    run.wait_for(after, SOON)
    kill(federation, "flwr-serverapp")
    failed = federation.finish(run)
    assert failed.code != 0
    done = federation.run(again(federation))
    assert done.code == 0, done.said
    assert done.results["registry"]["joined"] == list(DIGITS)
    assert done.results["left_out"] == []


def test_after_a_killed_superlink_the_run_goes_on(federation):
    run = federation.submit(SETTINGS)
    run.wait_for("fisher: 3 client(s)", SOON)
    federation.server["superlink"].kill()
    failed = federation.finish(run)
    assert failed.code != 0
    federation.server["proxy"].end()
    federation.start_server()
    for client in DIGITS:
        federation.clients[client].end()
        federation.start_client(client, patience=PATIENCE)
    done = federation.run(again(federation))
    assert done.code == 0, done.said
    assert done.results["registry"]["joined"] == list(DIGITS)
