"""The guard ends everything that its command started, and nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcompo.engine import guard

# A child in a session of its own whose parent has already ended: what Ray's daemons are.
STRAY = "(setsid sleep 298.{tag} &) ; sleep 299.{tag}"


def start(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", guard.__file__, str(folder), *command], stdin=subprocess.PIPE
    )


def sleepers(tag: str) -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode().split("\0")
        except OSError:
            continue
        if words[0] == "sleep" and words[1].endswith(f".{tag}"):
            found.append(words[1])
    return sorted(found)


def wait_for(condition: Callable[[], object], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    private = tmp_path / "private"
    private.mkdir()
    (private / "file").write_text("x")
    return private


@pytest.mark.parametrize("way", ["close", signal.SIGINT, signal.SIGTERM])
def test_ends_also_what_has_left_the_session(folder: Path, way: object) -> None:
    tag = f"{time.time_ns()}"
    process = start(folder, "sh", "-c", STRAY.format(tag=tag))
    bystander = subprocess.Popen(["sleep", f"297.{tag}"])
    try:
        assert wait_for(lambda: len(sleepers(tag)) == 3)
        if isinstance(way, signal.Signals):
            process.send_signal(way)
        else:
            assert process.stdin is not None
            process.stdin.close()
        process.wait(20)
        assert sleepers(tag) == [f"297.{tag}"]
        assert bystander.poll() is None
        assert not folder.exists()
    finally:
        bystander.kill()
        bystander.wait()


def test_ends_what_ignores_the_request_to_end(folder: Path) -> None:
    tag = f"{time.time_ns()}"
    process = start(folder, "sh", "-c", f"trap '' TERM; sleep 299.{tag}; sleep 298.{tag}")
    assert wait_for(lambda: sleepers(tag))
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(20) == 128 + signal.SIGKILL
    assert sleepers(tag) == []


def test_ends_when_the_command_does_and_passes_its_status_on(folder: Path) -> None:
    tag = f"{time.time_ns()}"
    process = start(folder, "sh", "-c", f"(setsid sleep 298.{tag} &) ; exit 7")
    assert process.wait(20) == 7
    assert sleepers(tag) == []


def test_a_missing_command_is_127(folder: Path) -> None:
    assert start(folder, "no-such-program-here").wait(20) == 127
    assert not folder.exists()
