"""Runs the Flower app on an engine of its own, and reports how the run ended.

``flwr run`` works too. But it needs the network for each run, may run old code in a daemon that is
still there, takes relative paths from that daemon's folder, and exits with 0 when a run has failed.
Here an engine (:mod:`fedcompo.engine.superlink`) serves one run and ends with it; or there is none,
and this process runs the apps (:mod:`fedcompo.engine.in_process`). A run is done when the server
says so, with the last thing that it does, *and* its results are on disk; nobody waits for Flower
and Ray to end in good order, which takes them seconds.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from fedcompo.config.choices import EngineKind
from fedcompo.config.setting import Scalar
from fedcompo.engine.log import Event, EventTail, last_error, note, read_from
from fedcompo.engine.resources import Resources
from fedcompo.engine.run_folder import CLIENTS, EVENTS, LOG, PROGRESS, RESULTS
from fedcompo.engine.superlink import Engine, started
from fedcompo.errors import LaunchError
from fedcompo.report.progress import Files
from fedcompo.storage.files import PACKAGE

TICK = 0.1
COMPLETED = "finished:completed"
INTRODUCTION = "Simulation failed with exception: "
OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Simulation:
    """A run that is ready to start."""

    settings: Mapping[str, Scalar]
    """Those that differ from the app's defaults; paths absolute."""
    output: Path
    """Folder that is this run's alone; see :mod:`fedcompo.engine.run_folder`."""
    clients: int
    app: Path
    """Folder of the Flower app; see :func:`find_app`."""
    resources: Resources
    engine: EngineKind = EngineKind.FLOWER
    preflight: Mapping[str, Any] = field(default_factory=dict)
    """What is known before it starts; see :mod:`fedcompo.engine.preflight`."""

    def run(self, on_event: OnEvent = lambda event: None) -> dict[str, Any]:
        """Run the app with these settings, tell its events, and return its results.

        SIGTERM ends the run and raises ``SystemExit(143)``; Ctrl-C raises ``KeyboardInterrupt``.
        Either way, and however else it ends, no process of the run is left.

        Raises:
            LaunchError: If the run could not start or failed; with the reason.
        """
        # 0 clients would mean num-tasks to the server, which is not the number of a folder's.
        config = {**self.settings, "output": str(self.output)}
        config["num-clients"] = config.get("num-clients") or self.clients
        tail = EventTail(self.output / EVENTS)
        files = Files(self.output / CLIENTS / PROGRESS)

        def look() -> bool:
            for event in (*tail.read(), *files.read()):
                on_event(event)
            return tail.finished

        try:
            with _sigterm_unwinds():
                if self.engine is EngineKind.IN_PROCESS:
                    status, details = self._in_process(config, look)
                else:
                    status, details = self._on_flower(config, look, on_event)
        finally:
            files.clear()
        return _results(self.output, status, details, tail.failure)

    def _on_flower(
        self, config: Mapping[str, Scalar], look: Callable[[], bool], on_event: OnEvent
    ) -> tuple[str, str]:
        """Run on Flower's engine; returns the run's status and what Flower says about it."""
        if not config.get("in-flight") and (few := self.resources.in_flight(self.clients)):
            config = {**config, "in-flight": few}
        federation = self.resources.federation(self.clients)
        with started(self.output / LOG, self.app, config, federation) as engine:
            return _follow(engine, look, on_event)

    def _in_process(
        self, config: Mapping[str, Scalar], look: Callable[[], bool]
    ) -> tuple[str, str]:
        """Run in this thread, while another one looks for events; returns as Flower would."""
        add_to_path(self.app)
        from fedcompo.engine.in_process import run_apps  # imports torch and Flower

        with _looking(look):
            try:
                run_apps(config, self.clients, self.output)
            except Exception as error:
                return "finished:failed", str(error)
        return COMPLETED, ""


def find_app(package: Path | None = None) -> Path:
    """Find the folder of the Flower app: in the installed package, else in its checkout."""
    package = package or PACKAGE
    for folder in (package / "_app", package.parent):
        with contextlib.suppress(OSError, tomllib.TOMLDecodeError, KeyError, TypeError):
            project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
            if project["tool"]["flwr"]["app"]["components"]:
                return folder
    raise LaunchError(
        f"There is no Flower app: neither {package / '_app'} nor {package.parent} holds a "
        "pyproject.toml with [tool.flwr.app.components]. Install fedcompo again, or run it from a "
        "complete checkout."
    )


def add_to_path(app: Path) -> None:
    """Let the folder of an app be where its modules are imported from."""
    if str(app) not in sys.path:
        sys.path.insert(0, str(app))


@contextlib.contextmanager
def _looking(look: Callable[[], object]) -> Iterator[None]:
    """Look for events, in a thread of its own, until the context ends; raises what that raises."""
    ended = threading.Event()

    def again() -> None:
        last = False
        while not last:
            last = ended.wait(TICK)
            look()

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(again)
        try:
            yield
        finally:
            ended.set()
        looking.result()


def _follow(engine: Engine, look: Callable[[], bool], on_event: OnEvent) -> tuple[str, str]:
    """Look for events until the run has ended; returns its status and what Flower says about it.

    To look is to tell the new events; it is true once the server has finished.
    """
    begun = False
    while True:
        time.sleep(TICK)
        alive = engine.alive
        try:
            said = engine.hear()
        except LaunchError as error:
            if not begun:
                raise
            said = {"status": "finished:failed", "details": str(error)}
        if "run" in said:
            begun = True
            on_event(note("Flower's engine has started; Ray takes another moment."))
        if look():
            return COMPLETED, ""
        if "status" in said:
            return said["status"], said["details"]
        if not alive:
            return "finished:failed", "Flower's SuperLink ended before the run did."


def _results(output: Path, status: str, details: str, reported: str) -> dict[str, Any]:
    """Read the results of a run that has ended; raises LaunchError if there are none."""
    log = output / LOG
    if status == COMPLETED:
        try:
            results = json.loads((output / RESULTS).read_text(encoding="utf-8"))
            if isinstance(results, dict):
                return results
            why = f"{RESULTS} holds no results but {type(results).__name__}"
        except (OSError, ValueError) as error:
            why = f"{RESULTS} cannot be read: {error}"
        reason = f"Flower calls the run completed, but {why}."
    else:
        parts = (reported, details.removeprefix(INTRODUCTION))
        reasons = dict.fromkeys(part.strip() for part in parts if part.strip())
        # Flower repeats the app's words, and the app may put the error's name before them.
        shortest = [r for r in reasons if not any(r != other and other in r for other in reasons)]
        reason = "The run failed: " + " ".join(shortest or [f"Flower says {status}."])
    ending = last_error(read_from(log, 0))
    own = output / CLIENTS
    clients = f"\nThe clients' own logs: {own}" if own.is_dir() else ""
    raise LaunchError(
        f"{reason}\nThe end of Flower's log:\n{ending}\nThe whole log: {log}{clients}"
    )


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM raise an exception, as Ctrl-C does, so that every ``finally`` is run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def unwind(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
