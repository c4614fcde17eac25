"""A federation as ``fedcompo init-deployment`` writes it, on machines that are network namespaces.

Each machine gets its own copy of its own folder, and runs the scripts in there; nothing else. Where
namespaces are not allowed, all of them share the loopback of this machine, with ports of their own.

    images = digits_as_folders(folder, {"a": (0, 1), "b": (2, 3)}, training=10, test=12)
    with deployed(tmp_path / "federation", images) as federation:
        federation.start_server()
        federation.start_clients("ab")
        done = federation.run({"seed": 1, "local-epochs": 1})
        assert done.code == 0, done.said
        done.results["class_il_accuracy"]

To break things: ``federation.clients["a"].kill()`` (or ``kill(signal.SIGTERM)``), ``pause()`` and
``resume()``; ``federation.cut("a")`` and ``heal("a")`` unplug its cable; ``federation.submit()``
returns while the run is still going on; ``start_client("a", patience=90)`` starts a killed client
again. Whatever was started has a guard, which ends it and all that it started, also when the test
is killed: see ``guarded.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from guarded import START_SECONDS, Started, start_guarded, until
from machines import Machines
from PIL import Image
from sklearn.datasets import load_digits

from fedcompo.config.scenario import as_toml
from fedcompo.config.setting import Scalar
from fedcompo.deployment import folders
from fedcompo.deployment.plan import Deployment
from fedcompo.engine.launcher import find_app

DIGITS = {"hospital-a": (0, 1, 2), "hospital-b": (3, 4, 5), "hospital-c": (6, 7, 8, 9)}
"""Three clients and their classes."""
TWO = {client: DIGITS[client] for client in ("hospital-a", "hospital-b")}
"""Enough where nobody fails: each message to a client starts a process there."""
QUICK: dict[str, Scalar] = {
    "seed": 3,
    "local-epochs": 1,
    "local-steps": 2,
    "rank": 2,
    "fisher-examples": 8,
    "realign": False,
    "device": "cpu",
}
"""Settings of a run of a minute."""
MARK = "FEDCOMPO_DEPLOYED"
"""Environment variable of all that a federation starts; its value is the federation's folder."""
RUN_SECONDS = 600.0
LET_IN = "SuperNode ID"
FIRST_RUNTIME_PORT = 19094
WITHOUT_OVERRIDE = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
"""Root may write where nobody may; clients insist on being ordinary users. This makes root one."""


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    code: int
    said: str
    """The log of the ServerApp."""
    output: Path

    @property
    def results(self) -> dict[str, Any]:
        """What it found out."""
        found: dict[str, Any] = json.loads((self.output / "results.json").read_text())
        return found


@dataclass
class DeployedFederation:
    """Machines with their folders, and what runs on them."""

    folder: Path
    """What ``init-deployment`` wrote."""
    deployment: Deployment
    machines: Machines
    clients: dict[str, Started] = field(default_factory=dict)
    server: dict[str, Started] = field(default_factory=dict)
    """``superlink`` and ``proxy``."""
    started: list[Started] = field(default_factory=list)
    runs: int = 0

    def home(self, machine: str) -> Path:
        """Folder of a machine: its copy of what was written for it."""
        return self.folder.parent / "machines" / machine

    def start_server(self) -> None:
        """Start SuperLink and proxy; returns when all clients are registered."""
        count = len(list((self.home("server") / "clients").glob("*.pub")))
        superlink = self.start("server", "./start-superlink")
        self.server = {"superlink": superlink, "proxy": self.start("server", "./start-proxy")}
        superlink.wait_for(" is registered\n", count=count)
        assert self.server["proxy"].alive, self.server["proxy"].said

    def start_client(self, name: str, *, patience: float = 0.0) -> Started:
        """Start a client; returns when the SuperLink has let it in.

        Args:
            name: Of the client.
            patience: Seconds in which it is started again when it is refused, as systemd does: one
                that was killed is refused until its session has expired, which takes 54 seconds.
        """
        deadline = time.monotonic() + patience
        client = self._try_to_start(name)
        while LET_IN not in client.said:
            assert time.monotonic() < deadline, f"{name} was not let in:\n{client.said}"
            time.sleep(2)
            client = self._try_to_start(name)
        self.clients[name] = client
        return client

    def start_clients(self, names: Iterable[str]) -> None:
        """Start clients side by side; returns when the SuperLink has let all of them in."""
        begun = {name: self.start(name, *self.unprivileged, "./start") for name in names}
        for name, client in begun.items():
            _answered(client)
            assert LET_IN in client.said, f"{name} was not let in:\n{client.said}"
        self.clients |= begun

    def _try_to_start(self, name: str) -> Started:
        return _answered(self.start(name, *self.unprivileged, "./start"))

    @property
    def unprivileged(self) -> Sequence[str]:
        """Words that make the command behind them an ordinary user's, which it may be already."""
        return WITHOUT_OVERRIDE if os.geteuid() == 0 else ()

    def submit(self, settings: Mapping[str, Scalar]) -> Started:
        """Start a run, with ``./run`` on the server, and return at once."""
        self.runs += 1
        file = self.folder.parent / f"run-{self.runs}.toml"
        file.write_text(as_toml({**settings, "output": str(self.output)}))
        return self.start("server", "./run", str(file))

    def finish(self, run: Started, seconds: float = RUN_SECONDS) -> Finished:
        """Wait for the run that was submitted last."""
        until(lambda: not run.alive, seconds, run)
        return Finished(run.guard.wait(), run.said, self.output)

    def run(self, settings: Mapping[str, Scalar]) -> Finished:
        """Run the app to its end."""
        return self.finish(self.submit(settings))

    @property
    def output(self) -> Path:
        """Folder of the results of the last run."""
        return self.home("server") / "runs" / f"run-{self.runs}"

    def start(self, machine: str, *command: str, **variables: str) -> Started:
        """Start a command in the folder of a machine, on that machine."""
        log = self.folder.parent / f"{machine}-{len(self.started)}.log"
        words = [*self.machines.on(machine), *command]
        started = start_guarded(
            words, self.home(machine), log, {MARK: str(self.folder), **variables}
        )
        self.started.append(started)
        return started

    def cut(self, client: str) -> None:
        """Unplug a client's cable; skips the test where there are no cables."""
        self.machines.plug(client, plugged=False)

    def heal(self, client: str) -> None:
        """Plug it in again."""
        self.machines.plug(client, plugged=True)

    def left_over(self) -> list[int]:
        """Processes of this federation, by the mark in their environment."""
        mark = f"{MARK}={self.folder}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
        return found


def _answered(client: Started) -> Started:
    """Wait until a client was let in, or has ended."""
    until(lambda: LET_IN in client.said or not client.alive, START_SECONDS, client)
    return client


@contextlib.contextmanager
def deployed(folder: Path, images: Mapping[str, Path]) -> Iterator[DeployedFederation]:
    """Write a deployment, give each machine its folder; nothing is started yet.

    Args:
        folder: For everything; empty, or to be made.
        images: Folder of each client's images, by the client's name.
    """
    require_nginx()
    with Machines.connected(["server", *images, "outsider"]) as machines:
        separate = machines.separate
        ports = (8443, 8000, 9443) if separate else (free_port(), free_port(), free_port())
        address = machines.addresses["server"]
        deployment = Deployment(address, tuple(images), *ports)
        written = folder / "written"
        folders.create(written, deployment, find_app(), with_keys=True)
        federation = DeployedFederation(written, deployment, machines)
        shutil.copytree(written / "server", federation.home("server"))
        shutil.copytree(written / "server" / "app", federation.home("outsider") / "app")
        for position, (name, data) in enumerate(images.items()):
            settle(written / "clients" / name, federation.home(name), data, position)
        try:
            yield federation
        finally:
            for process in reversed(federation.started):
                process.end()
            deadline = time.monotonic() + 10
            while federation.left_over() and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not federation.left_over()


def digits_as_folders(
    folder: Path, digits: Mapping[str, Sequence[int]], *, training: int, test: int
) -> dict[str, Path]:
    """Write images as people have them: <client>/train/<class>/*.png, <client>/test/<class>/*.png.

    Args:
        folder: Where to.
        digits: Classes of each client.
        training: Training images a class.
        test: Test images a class.

    Returns:
        The folder of each client.
    """
    data = load_digits()
    for client, classes in digits.items():
        for digit in classes:
            for number, row in enumerate((data.target == digit).nonzero()[0][: training + test]):
                part = "train" if number < training else "test"
                file = folder / client / part / str(digit) / f"{number:02d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((data.images[row] * 15.9).astype("uint8")).save(file)
    return {client: folder / client for client in digits}


def settle(source: Path, home: Path, data: Path, position: int = 0) -> None:
    """Copy a client's folder to its machine, and write there where its images are."""
    shutil.copytree(source, home)
    chosen = {"DATA": data, "DEVICE": "cpu", "THREADS": 1, "PORT": FIRST_RUNTIME_PORT + position}
    lines = (home / "client.conf").read_text().splitlines()
    for number, line in enumerate(lines):
        key = line.partition("=")[0]
        if key in chosen:
            lines[number] = f"{key}={chosen[key]}"
    (home / "client.conf").write_text("\n".join(lines) + "\n")


def require_nginx() -> None:
    """Skip the test where there is no nginx."""
    if shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin") is None:
        pytest.skip("nginx is not installed; try: apt-get install nginx-light")


def free_port() -> int:
    """A port of this machine's loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
