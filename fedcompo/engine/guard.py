"""Runs one command, and ends every process that the command started.

    python guard.py FOLDER COMMAND [ARGUMENT ...]

Flower's SuperLink starts processes in sessions of their own, Ray starts more, and neither ends them
all when it is interrupted. This small parent process does. It adopts every orphan among its
descendants (Linux's ``PR_SET_CHILD_SUBREAPER``), so that none can leave its tree; then it ends its
*direct* children, whose process ids cannot be reused before it has waited for them, until no child
is left. So it never signals a process that is not its own.

It ends them when the command ends, when it gets SIGINT, SIGTERM or SIGHUP, and when its standard
input closes: so a starter that is killed leaves no process behind. At last it removes FOLDER. The
exit status is the command's, 127 if it cannot be found, 128 + n if signal n ended it.

Standard library only: it runs as a file of its own (``python -I``), in milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

GRACE = 3.0
"""Seconds that the command has to end in good order before it is killed."""

TICK = 0.05

_PR_SET_CHILD_SUBREAPER = 36


def main(arguments: list[str]) -> int:
    """Run the command given by ``arguments``; see the top of this file."""
    folder, command = Path(arguments[0]), arguments[1:]
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, frame: signals.append(received))
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        leader = os.posix_spawnp(
            command[0],
            command,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
        )
        ended: dict[int, int] = {}
        while leader not in ended and not signals and not _left_alone():
            ended.update(_reap())
        ended.update(end_all(leader if leader not in ended else None))
        code = os.waitstatus_to_exitcode(ended[leader])
        return code if code >= 0 else 128 - code
    except FileNotFoundError:
        return 127
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def end_all(leader: int | None) -> dict[int, int]:
    """End every descendant: ask ``leader`` to do it, and kill what it leaves.

    Returns:
        The wait status of each child that was waited for, by process id.
    """
    ended: dict[int, int] = {}
    if leader is not None:
        os.kill(leader, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while True:
        ended.update(_reap())
        left = children(os.getpid())
        if not left:
            return ended
        if leader is None or leader in ended or time.monotonic() > deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(TICK)


def children(parent: int) -> set[int]:
    """Process ids of a process's children, those that it has adopted included."""
    own = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):  # ended meanwhile
            # pid (name) state parent ...; the name may hold blanks and brackets
            after_name = stat.read_text(errors="replace").rpartition(")")[2].split()
            if int(after_name[1]) == parent:
                own.add(int(stat.parent.name))
    return own


def _left_alone() -> bool:
    """Wait a moment; true once whoever holds our standard input has closed it."""
    ready, _, _ = select.select([0], [], [], 4 * TICK)
    return bool(ready) and not os.read(0, 4096)


def _reap() -> dict[int, int]:
    """Wait for every child that has ended, without blocking."""
    ended: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = status
    return ended


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
