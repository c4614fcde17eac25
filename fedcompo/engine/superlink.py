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

from fedcompo.config.setting import Scalar
from fedcompo.engine import guard
from fedcompo.engine.log import LineTail, last_error, read_from
from fedcompo.engine.proxies import past_loopback
from fedcompo.engine.run_folder import CLIENTS, LOGS
from fedcompo.errors import LaunchError
from fedcompo.storage.files import PACKAGE

MARKER = "FEDCOMPO_ENGINE"
"""Environment variable that every process of an engine carries; its value names the engine."""

READY = "Uvicorn running on"
PORT_TAKEN = "address already in use"
ATTEMPTS = 3
START_SECONDS = 120.0
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
    # One process a CPU starts, with what the app is to run there; not idle ones before.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_preload_python_modules": "clients.preload",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Engine:
    """A running SuperLink, and the run that it was started for."""

    folder: Path
    """Its private folder."""
    log: Path
    """File that its output, and that of the run's apps, is appended to."""
    guard: subprocess.Popen[bytes]
    """The process that ends it; see :mod:`fedcompo.engine.guard`."""
    control: subprocess.Popen[bytes]
    """The process that follows the run; see :mod:`fedcompo.engine.control`."""
    answers: LineTail
    """What that says, in lines of JSON."""

    @property
    def alive(self) -> bool:
        """Whether the SuperLink still runs."""
        return self.guard.poll() is None

    def hear(self) -> dict[str, Any]:
        """What is new of the run: that it has started, or how it has ended; see ``control``.

        Raises:
            LaunchError: If the SuperLink has refused the run, or does not answer any more.
        """
        ended = self.control.poll() is not None
        said: dict[str, Any] = {}
        for line in self.answers.read():
            said |= json.loads(line)
        if "error" in said or (ended and "status" not in said):
            reason = said.get(
                "error", f"the process that follows the run ended with {self.control.returncode}"
            )
            raise LaunchError(f"Flower does not answer: {reason}\nFlower's log: {self.log}")
        return said


@contextlib.contextmanager
def started(
    log: Path, app: Path, settings: Mapping[str, Scalar], federation: Mapping[str, float]
) -> Iterator[Engine]:
    """Start an engine, and a run on it; every process that it starts ends with the context.

    Args:
        log: File to append to.
        app: Folder with the app's ``pyproject.toml``.
        settings: Run config; every key must have a default in the app.
        federation: Flower's simulation settings, such as ``num-supernodes``.

    Raises:
        LaunchError: If it does not come up; with the end of its log.
    """
    for _ in range(ATTEMPTS):
        begins = log.stat().st_size if log.exists() else 0
        with _superlink(log) as (engine, address):
            asked = {"app": str(app), "run": settings}
            sizes = {key.replace("-", "_"): value for key, value in federation.items()}
            _say(engine, **asked, federation=sizes)
            logged = _wait_until_ready(engine, begins)
            if READY in logged:
                _say(engine, address=address)
                yield engine
                return
        if PORT_TAKEN not in logged:
            break
    raise LaunchError(
        f"Flower's SuperLink did not start. The end of its log ({log}):\n{last_error(logged)}"
    )


def _say(engine: Engine, **said: Any) -> None:
    assert engine.control.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended: `hear` tells
        engine.control.stdin.write(json.dumps(said).encode() + b"\n")
        engine.control.stdin.flush()


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
def _superlink(log: Path) -> Iterator[tuple[Engine, str]]:
    """Start a SuperLink and the process that follows its run; yields its address, too."""
    folder = Path(tempfile.mkdtemp(prefix="fedcompo-", dir=_temporary()))
    try:
        environment = _environment(folder, os.environ)
        environment[LOGS] = str(log.absolute().parent / CLIENTS)
        superlink, port = program("flower-superlink", environment), _free_port()
        _write_files(folder)
        serve = [superlink, "--insecure", "--simulation"]
        serve += ["--host", "127.0.0.1", "--port", str(port)]
        with log.open("ab") as sink, (folder / "answers").open("wb") as answers:
            own: dict[str, Any] = {
                "stdin": subprocess.PIPE,  # closes when we end, however we end: they then act
                "stderr": sink,
                "cwd": folder / "cwd",
                "env": environment,
                "start_new_session": True,  # Ctrl-C in a terminal reaches us alone
            }
            guarded = [sys.executable, "-I", guard.__file__, str(folder), *serve]
            process = subprocess.Popen(guarded, stdout=sink, **own)
            # -P: the modules beside it have names of their own
            follow = [sys.executable, "-P", str(Path(guard.__file__).with_name("control.py"))]
            following = subprocess.Popen(follow, stdout=answers, **own)
        try:
            tail = LineTail(folder / "answers")
            yield Engine(folder, log, process, following, tail), f"127.0.0.1:{port}"
        finally:
            for started_process in (following, process):
                assert started_process.stdin is not None
                with contextlib.suppress(BrokenPipeError):
                    started_process.stdin.close()
            following.kill()
            following.wait()
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


def _write_files(folder: Path) -> None:
    """Write the files of an engine's private folder."""
    (folder / "cwd").mkdir()
    (folder / "home").mkdir()
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
