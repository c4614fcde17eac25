"""Flower's engine as a child process: a private SuperLink that serves simulations, then ends.

Everything it needs lies in a folder of its own, which is deleted with it: Flower's home, Ray's
session, an empty working directory (Ray's workers look for code there before they look in the app).
It does not disturb another Flower or Ray on this machine, and listens on loopback only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcompo.config.scenario import as_toml
from fedcompo.config.setting import Scalar
from fedcompo.engine import guard
from fedcompo.engine.log import last_error, plain, read_from
from fedcompo.engine.proxies import past_loopback
from fedcompo.engine.run_folder import CLIENTS, LOGS
from fedcompo.errors import LaunchError
from fedcompo.storage.files import PACKAGE

MARKER = "FEDCOMPO_ENGINE"
"""Environment variable that every process of an engine carries; its value names the engine."""

LINK = "simulation"
READY = "Uvicorn running on"
PORT_TAKEN = "address already in use"
ATTEMPTS = 3
START_SECONDS = 120.0
ANSWER_SECONDS = 120.0
END_SECONDS = 30.0
LONGEST_TEMPORARY = 20
"""Ray's sockets lie 68 characters below the engine's folder; a socket's path may have 107."""

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # The apps run in this very environment; otherwise each run installs another, or fails offline.
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    # "No cluster": Ray then listens on loopback instead of the machine's address.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Engine:
    """A running SuperLink, and how to talk to it.

    Attributes:
        folder: Its private folder.
        log: File that its output is appended to.
        environment: Environment of every Flower program that is to find it.
        guard: The process that ends it; see :mod:`fedcompo.engine.guard`.
    """

    folder: Path
    log: Path
    environment: Mapping[str, str]
    guard: subprocess.Popen[bytes]

    def submit(
        self, app: Path, settings: Mapping[str, Scalar], federation: Mapping[str, float]
    ) -> str:
        """Start a run of the app in a folder; returns the run's id.

        Args:
            app: Folder with the app's ``pyproject.toml``.
            settings: Run config; every key must have a default in the app.
            federation: Flower's simulation settings, such as ``num-supernodes``.
        """
        # A file: values on the command line cannot hold both blanks and quotes.
        config = self.folder / "run.toml"
        config.write_text(as_toml(settings), encoding="utf-8")
        size = " ".join(f"{key}={value}" for key, value in federation.items())
        options = ("--run-config", str(config), "--federation-config", size)
        return str(self._ask("run", str(app), LINK, *options)["run-id"])

    def status(self, run_id: str) -> tuple[str, str]:
        """Status of a run (``finished:completed``, ...) and what Flower says about it."""
        run = self._ask("list", LINK, "--run-id", run_id)["runs"][0]
        details = str(run.get("status-details") or "")
        return str(run["status"]), "" if details == "N/A" else details

    @contextlib.contextmanager
    def logging(self, run_id: str) -> Iterator[None]:
        """Append what the apps of a run print to the log, for as long as this context lasts."""
        command = [program("flwr", self.environment), "log", run_id, LINK, "--stream"]
        with (
            self.log.open("ab") as sink,
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                cwd=self.folder / "cwd",
                env=self.environment,
                start_new_session=True,
            ) as stream,
        ):
            try:
                yield
                with contextlib.suppress(subprocess.TimeoutExpired):
                    stream.wait(5)  # the last lines arrive after the run has ended
            finally:
                stream.kill()

    @property
    def alive(self) -> bool:
        """Whether the SuperLink still runs."""
        return self.guard.poll() is None

    def _ask(self, *arguments: str) -> dict[str, Any]:
        """Run ``flwr`` and return its answer; raises LaunchError with what it complains about."""
        try:
            answer = subprocess.run(
                [program("flwr", self.environment), *arguments, "--format", "json"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                cwd=self.folder / "cwd",
                env=self.environment,
                timeout=ANSWER_SECONDS,
            )
            parsed = json.loads(answer.stdout[answer.stdout.index("{") :])
        except subprocess.TimeoutExpired as error:
            raise LaunchError(
                f"`flwr {arguments[0]}` did not answer within {ANSWER_SECONDS:.0f} seconds."
            ) from error
        except ValueError as error:
            output = plain(answer.stdout + answer.stderr).strip()
            raise LaunchError(f"`flwr {arguments[0]}` failed:\n{output}") from error
        if not parsed.get("success"):
            lines = plain(str(parsed.get("error-message", parsed))).splitlines()
            kept = [line for line in lines if not line.startswith("Using SuperLink")]
            reason = "\n".join(kept).strip()
            raise LaunchError(f"`flwr {arguments[0]}` failed:\n{reason}\nFlower's log: {self.log}")
        return dict(parsed)


@contextlib.contextmanager
def started(log: Path) -> Iterator[Engine]:
    """Start an engine that logs to a file; every process that it starts ends with the context.

    Raises:
        LaunchError: If it does not come up; with the end of its log.
    """
    for _ in range(ATTEMPTS):
        begins = log.stat().st_size if log.exists() else 0
        with _superlink(log) as engine:
            logged = _wait_until_ready(engine, begins)
            if READY in logged:
                yield engine
                return
        if PORT_TAKEN not in logged:
            break
    raise LaunchError(
        f"Flower's SuperLink did not start. The end of its log ({log}):\n{last_error(logged)}"
    )


def program(name: str, environment: Mapping[str, str]) -> str:
    """Path of one of Flower's programs; raises LaunchError if it is not installed."""
    path = shutil.which(name, path=environment["PATH"])
    if path is None:
        raise LaunchError(
            f"Flower's program `{name}` was found neither in {_scripts()} nor on the PATH. "
            'Install it into this interpreter: pip install "flwr[simulation]>=1.41,<1.42".'
        )
    return path


@contextlib.contextmanager
def _superlink(log: Path) -> Iterator[Engine]:
    folder = Path(tempfile.mkdtemp(prefix="fedcompo-", dir=_temporary()))
    try:
        environment = _environment(folder, os.environ)
        environment[LOGS] = str(log.absolute().parent / CLIENTS)
        superlink = program("flower-superlink", environment)
        port = _free_port()
        _write_files(folder, port)
        serve = [superlink, "--insecure", "--simulation"]
        serve += ["--host", "127.0.0.1", "--port", str(port)]
        with log.open("ab") as sink:
            process = subprocess.Popen(
                [sys.executable, "-I", guard.__file__, str(folder), *serve],
                stdin=subprocess.PIPE,  # closes when we end, however we end: the guard then acts
                stdout=sink,
                stderr=subprocess.STDOUT,
                cwd=folder / "cwd",
                env=environment,
                start_new_session=True,  # Ctrl-C in a terminal reaches us alone
            )
        try:
            yield Engine(folder, log, environment, process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it goes on by itself
                process.wait(END_SECONDS)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_ready(engine: Engine, begins: int) -> str:
    """Wait until the SuperLink is ready, has ended, or is too slow; returns what it has logged.

    Its log decides, not a connection: on a taken port another program would answer.
    """
    deadline = time.monotonic() + START_SECONDS
    logged = ""
    while READY not in logged and engine.alive and time.monotonic() < deadline:
        time.sleep(0.05)
        logged = read_from(engine.log, begins)
    return read_from(engine.log, begins)


def _environment(folder: Path, user: Mapping[str, str]) -> dict[str, str]:
    """Make the engine's environment: the user's, without what would mislead Flower or Ray."""
    environment = {key: value for key, value in user.items() if key != "RAY_ADDRESS"}
    environment |= QUIET
    environment |= {MARKER: uuid.uuid4().hex, "FLWR_HOME": str(folder / "home")}
    environment["RAY_TMPDIR"] = str(folder)
    environment["FEDCOMPO_STATE"] = str(folder / "state")  # what simulated clients keep
    # Flower's programs start each other by name.
    environment["PATH"] = os.pathsep.join([_scripts(), user.get("PATH", os.defpath)])
    environment = past_loopback(environment)
    if _must_be_linked():
        paths = [str(folder / "library"), user.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment


def _write_files(folder: Path, port: int) -> None:
    """Write the files of an engine's private folder."""
    (folder / "cwd").mkdir()
    (folder / "home").mkdir()
    (folder / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "{LINK}"\n\n'
        f'[superlink.{LINK}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    if _must_be_linked():
        # A link to this package alone: its checkout on the path would also bring that checkout's
        # `clients` and `server`, and they would hide the app's.
        (folder / "library").mkdir()
        (folder / "library" / "fedcompo").symlink_to(PACKAGE)


def _must_be_linked() -> bool:
    """Whether this package lies outside the folders in which the interpreter finds packages."""
    home = PACKAGE.parent
    return home not in {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}


def _scripts() -> str:
    return sysconfig.get_path("scripts")


def _temporary() -> str:
    folder = tempfile.gettempdir()
    return folder if len(folder) <= LONGEST_TEMPORARY else "/tmp"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
