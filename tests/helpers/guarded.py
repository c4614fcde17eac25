"""Processes that tests start: each has a guard, which ends it and all that it starts.

The guard (:mod:`fedcompo.engine.guard`) notices when we end, however we end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedcompo.engine import guard
from fedcompo.engine.log import plain

START_SECONDS = 180.0


def descendants(pid: int) -> set[int]:
    """Process ids of a process's children, their children and so on."""
    children = guard.children(pid)
    return children.union(*map(descendants, children))


@dataclass
class Started:
    """A process on a machine, and all that it starts."""

    name: str
    log: Path
    guard: subprocess.Popen[bytes]

    @property
    def said(self) -> str:
        """What it has printed so far."""
        return plain(self.log.read_text(errors="replace"))

    @property
    def alive(self) -> bool:
        """Whether it, or something that it started, still runs."""
        return self.guard.poll() is None

    @property
    def pid(self) -> int:
        """Of the program itself."""
        return min(guard.children(self.guard.pid))  # what it started, and left, came later

    def wait_for(self, text: str, seconds: float = START_SECONDS, count: int = 1) -> None:
        """Wait until it has printed a text so often; fail with its log if it does not."""
        until(lambda: self.said.count(text) >= count or not self.alive, seconds, self)
        assert self.said.count(text) >= count, f"{self.name} never said {text!r}:\n{self.said}"

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send the program a signal, and wait until it has ended; its children end with it."""
        os.kill(self.pid, number)
        self.guard.wait(30)

    def pause(self) -> None:
        """Stop it and its children where they are."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """End it in good order, with all that it started."""
        assert self.guard.stdin is not None
        self.resume()
        self.guard.stdin.close()
        self.guard.wait(30)

    def _signal(self, number: signal.Signals) -> None:
        for pid in descendants(self.guard.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def start_guarded(
    command: Sequence[str], folder: Path, log: Path, variables: Mapping[str, str]
) -> Started:
    """Start a command that ends with us, however we end, and all that it starts with it.

    Args:
        command: Program and arguments.
        folder: Where it runs.
        log: File for all that it prints; new.
        variables: What its environment has beside ours, and the programs of this interpreter.
    """
    scratch = tempfile.mkdtemp(prefix="fedcompo-guard-")  # the guard removes it
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    with log.open("xb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-I", guard.__file__, scratch, *command],
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **variables, "PATH": path},
            start_new_session=True,
        )
    return Started(log.stem, log, process)


def until(done: Callable[[], bool], seconds: float, process: Started) -> None:
    """Wait for something; fail with the log of a process if it takes too long."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise AssertionError(f"{process.name} took over {seconds:.0f} s:\n{process.said}")
        time.sleep(0.1)
