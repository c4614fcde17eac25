"""A federation of separate machines, run for real from the files that were written for it.

TLS and authentication of nodes are on; each machine has a network of its own where that is allowed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from deployed_federation import (
    LET_IN,
    RUN_SECONDS,
    TWO,
    DeployedFederation,
    Finished,
    deployed,
    settle,
)
from engine_runs import SHARED, Simulated
from guarded import until

from fedcompo.deployment import folders
from fedcompo.method.contribution import Contribution
from fedcompo.registry.record_verification import verify_record
from fedcompo.registry.registry import Registry

pytestmark = pytest.mark.simulation

BLOCK = 64
"""Bytes in a row that are looked for: by chance they occur nowhere."""


@pytest.fixture(scope="module")
def federation(
    hospitals: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DeployedFederation]:
    folder = tmp_path_factory.mktemp("federation")
    with deployed(folder, {client: hospitals / client for client in TWO}) as started:
        started.start_server()
        started.start_clients(TWO)
        yield started


@pytest.fixture(scope="module")
def watched(federation: DeployedFederation) -> tuple[Finished, int]:
    """A run, and the size of the largest file that the server's state ever held during it."""
    state, sizes = federation.home("server") / "state", [0]

    def over() -> bool:
        for folder, _, files in os.walk(state):  # unlike `rglob`, past a folder that vanishes
            for file in files:
                with contextlib.suppress(FileNotFoundError):
                    sizes.append((Path(folder) / file).stat().st_size)
        return not run.alive

    run = federation.submit(SHARED)
    until(over, RUN_SECONDS, run)
    finished = federation.finish(run)
    assert finished.code == 0, finished.said
    return finished, max(sizes)


@pytest.fixture(scope="module")
def done(watched: tuple[Finished, int]) -> Finished:
    return watched[0]


def task_vectors(output: Path) -> dict[str, dict[str, torch.Tensor]]:
    registry = output / "registry" / "clients"
    loaded = (Contribution.open(registry / client) for client in TWO)
    return {one.client: dict(one.task_vector.tensors) for one in loaded}


def test_a_deployment_finds_what_a_simulation_finds(done: Finished, simulated: Simulated) -> None:
    assert simulated.command.returncode == 0, simulated.command.stderr
    there = Finished(0, "", simulated.output)
    accuracy = done.results["class_il_accuracy"]
    assert accuracy == there.results["class_il_accuracy"]
    assert 0.5 < accuracy < 1, "the comparison would not notice a difference"
    assert list(done.results["per_client"]) == list(TWO)
    # Not only as accurate, but the same, to the last bit.
    expected = task_vectors(there.output)
    for client, tensors in task_vectors(done.output).items():
        assert tensors.keys() == expected[client].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[client][name]), (client, name)


def blocks(output: Path) -> list[bytes]:
    """A piece of each client's largest tensor, as it lies in memory and in messages."""
    pieces = []
    for tensors in task_vectors(output).values():
        largest = max(tensors.values(), key=torch.Tensor.numel).contiguous().numpy().tobytes()
        middle = len(largest) // 2
        pieces.append(largest[middle : middle + BLOCK])
        assert len(set(pieces[-1])) > BLOCK // 4, "a piece of zeros would be found anywhere"
    return pieces


def holders(folder: Path, pieces: list[bytes]) -> list[Path]:
    """Files that hold one of the pieces."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    contents = {file: file.read_bytes() for file in files}
    return [file for file, held in contents.items() if any(piece in held for piece in pieces)]


def test_the_server_keeps_task_vectors_in_the_registry_alone(
    federation: DeployedFederation, done: Finished
) -> None:
    server = federation.home("server")
    assert (server / "state" / "flower").is_dir()
    found = holders(server, blocks(done.output))
    registry = done.output / "registry"
    assert len([file for file in found if file.is_relative_to(registry / "clients")]) == len(TWO)
    assert [file for file in found if not file.is_relative_to(registry)] == []


def test_what_clients_send_is_never_on_the_servers_disk(
    watched: tuple[Finished, int],
) -> None:
    finished, largest = watched
    sent = [
        tensor.numel() * tensor.element_size()
        for tensors in task_vectors(finished.output).values()
        for tensor in tensors.values()
    ]
    # The app's sources are there, each smaller than what a client sends.
    assert 0 < largest < sum(sent) / len(TWO)


def outsider(federation: DeployedFederation, address: str, *command: str) -> str:
    """Give a Flower command from a machine that has the certificate, and nothing else."""
    home = federation.home("outsider")
    (home / "flower").mkdir(exist_ok=True)
    certificate = shutil.copy(federation.folder / "server" / "certificates" / "ca.crt", home)
    (home / "flower" / "config.toml").write_text(
        f'[superlink.target]\naddress = "{address}"\nroot-certificates = "{certificate}"\n'
    )
    started = federation.start("outsider", "flwr", *command, FLWR_HOME=str(home / "flower"))
    assert started.guard.wait(60) is not None
    return started.said


def runs(federation: DeployedFederation) -> str:
    home = federation.home("server") / "state" / "flower"
    asked = federation.start("server", "flwr", "list", "federation", FLWR_HOME=str(home))
    assert asked.guard.wait(60) == 0, asked.said
    return asked.said


def test_an_outsider_can_neither_register_a_key_nor_start_a_run(
    federation: DeployedFederation, done: Finished
) -> None:
    before = runs(federation)
    folders.add(federation.folder, "intruder", with_keys=True)
    key = federation.folder / "server" / "clients" / "intruder.pub"
    address = federation.deployment.address
    said = outsider(federation, address, "supernode", "register", str(key), "target")
    assert "registered successfully" not in said
    assert "403" in said, said
    said = outsider(federation, address, "run", "app", "target")
    assert "Successfully started run" not in said
    assert "403" in said, said
    assert runs(federation) == before


def test_from_outside_nobody_reaches_the_superlink_itself(
    federation: DeployedFederation,
) -> None:
    if not federation.machines.separate:
        pytest.skip("network namespaces are not allowed here: there is no outside")
    deployment = federation.deployment
    said = {}
    for port in (deployment.port, deployment.superlink_port):
        connect = f"import socket; socket.create_connection(({deployment.server!r}, {port}), 10)"
        tried = federation.start("outsider", sys.executable, "-c", connect)
        tried.guard.wait(30)
        said[port] = tried.said
    assert said[deployment.port] == ""
    assert "ConnectionRefusedError" in said[deployment.superlink_port]


def test_a_client_that_nobody_registered_is_not_let_in(
    federation: DeployedFederation, hospitals: Path, done: Finished
) -> None:
    if not (federation.folder / "clients" / "stranger").exists():
        folders.add(federation.folder, "stranger", with_keys=True)
    home = federation.home("outsider") / "stranger"
    settle(federation.folder / "clients" / "stranger", home, hospitals / "hospital-a", position=9)
    started = federation.start("outsider", *federation.unprivileged, str(home / "start"))
    assert started.guard.wait(60) not in (0, 78), started.said
    assert LET_IN not in started.said


def test_clients_run_the_app_they_were_given_and_no_other(
    federation: DeployedFederation, done: Finished, tmp_path: Path
) -> None:
    app = federation.home("server") / "app" / "clients" / "app.py"
    given = app.read_text()
    trace = tmp_path / "trace"
    app.write_text(f"{given}\nopen({str(trace)!r}, 'w').close()\n")
    try:
        finished = federation.run(SHARED)
    finally:
        app.write_text(given)
    assert finished.code == 1, finished.said
    assert "Permission denied" in finished.said, finished.said
    assert not trace.exists()
    for client in TWO:
        assert federation.clients[client].alive
        assert len(list((federation.home(client) / "flower" / "apps").iterdir())) == 1


def test_one_process_imports_for_all_phases_of_a_client_also_after_one_that_failed(
    federation: DeployedFederation, done: Finished
) -> None:
    for client in TWO:
        said = federation.clients[client].said
        assert said.count("Start `flwr-clientapp` process") >= 3
        assert said.count(" is ready: ") == 1, said


@pytest.mark.slow  # a quarter of a minute
def test_a_run_that_waits_says_so_and_ends_with_its_command(
    federation: DeployedFederation, done: Finished
) -> None:
    run = federation.submit({**SHARED, "num-clients": 9})
    run.wait_for("2 of 9 client(s) are connected; waiting at most 1800 s")
    run.kill(signal.SIGTERM)
    assert "is being stopped" in run.said
    assert "running" not in runs(federation)


def test_settings_that_cannot_be_are_refused_before_anything_starts(
    federation: DeployedFederation, done: Finished
) -> None:
    before = runs(federation)
    refused = federation.run({"sead": 3})
    assert refused.code == 2
    assert "`sead`" in refused.said
    missing = federation.start("server", "./run", "nowhere.toml")
    assert missing.guard.wait(60) == 2
    assert "there is no settings file nowhere.toml" in missing.said
    assert runs(federation) == before


def test_a_client_leaves_from_its_own_machine(
    federation: DeployedFederation, done: Finished
) -> None:
    """The registry is served, one client leaves, another's certificate is locked out."""
    server, leaver = federation.home("server"), federation.home("hospital-b")
    copy = server / "runs" / "leaving"
    shutil.copytree(done.output / "registry", copy, symlinks=True)
    service = federation.start("server", "./start-registry", str(copy), PYTHONUNBUFFERED="1")
    try:
        service.wait_for("Serving ")
        there = federation.start("hospital-b", "./registry", "members")
        assert there.guard.wait(120) == 0, there.said
        assert all(client in there.said for client in TWO)
        left = federation.start("hospital-b", "./registry", "request-removal", "--yes")
        assert left.guard.wait(120) == 0, left.said + service.said
        assert Registry(copy).clients == ("hospital-a",)
        receipt, key = leaver / "removal-hospital-b.json", leaver / "removal-hospital-b.pem"
        findings = verify_record(receipt, registry=Registry(copy), public_key=key)
        assert not [finding for finding in findings if not finding.holds]
        certificate = federation.home("hospital-a") / "certificates" / "client.crt"
        known = x509.load_pem_x509_certificate(certificate.read_bytes())
        with (server / "revoked").open("a") as file:
            file.write(f"{known.fingerprint(hashes.SHA256()).hex()}\n")
        locked_out = federation.start("hospital-a", "./registry", "members")
        assert locked_out.guard.wait(120) == 1
        assert "was revoked" in locked_out.said
    finally:
        service.end()
        shutil.rmtree(copy)


def test_no_log_holds_a_secret(federation: DeployedFederation, done: Finished) -> None:
    folder = federation.folder
    keys = [*folder.rglob("*.key"), *folder.rglob("supernode")]
    assert len(keys) >= 3 + 2 * len(TWO)
    secrets = {line for key in keys for line in key.read_text().splitlines() if len(line) > 40}
    said = [process.said for process in federation.started]
    logs = [file.read_text() for file in federation.home("server").rglob("*.log")]
    for text in [*said, *logs]:
        assert not [secret for secret in secrets if secret in text]
