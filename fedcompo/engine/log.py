"""Reads what a run writes while it goes: Flower's log, and the events of our server.

Of the log, the last error is kept without the noise around it. Events are JSON objects, one a line:

==================  =====================================================================
``event``           with
==================  =====================================================================
``run``             ``clients`` (names, may be empty), ``phases``
``phase-started``   ``phase``, ``clients``
``client``          ``phase``, ``client``, ``status`` (``ok``, ``left-out``, ``missed``),
                    ``reason``, ``bytes_sent``, ``bytes_received``, ``seconds``; ``figures``:
                    losses and accuracies that it reports, if any
``progress``        ``phase`` (what was asked for), ``client``, ``what``, ``done``, ``total``,
                    ``unit``, ``rate`` (a second), ``seconds``; of work of two seconds and
                    more; the server's has no ``phase``
``phase-finished``  ``phase``, ``seconds``
``note``            ``text``
``finished``        ``results`` (name of the file)
``failed``          ``reason``
==================  =====================================================================

Each event also has ``time``, in seconds since 1970. Where a phase is repeated, as rounds are, its
events say in ``part`` which one it is: ``round 3``.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SERVER = "server"
"""Stands in place of a client's name where the server works."""
TRACEBACK = "Traceback (most recent call last)"
NOISE = re.compile(
    r"\[uvicorn\.access\]|\.(ListRuns|StreamLogs|StartRun)$|Exit Code: \d+$"
    r"|^An unhandled exception occurred|^For more information, visit"
)
LEVEL = re.compile(r"^(DEBUG|INFO|WARNING|ERROR)\s*:|^\d{4}-\d\d-\d\dT")


def read_from(file: Path, position: int) -> str:
    """Read the text of a file from a byte on; empty if there is no file."""
    return _bytes_from(file, position).decode("utf-8", errors="replace")


def _bytes_from(file: Path, position: int) -> bytes:
    if not file.exists():
        return b""
    with file.open("rb") as stream:
        stream.seek(position)
        return stream.read()


class LineTail:
    """Reads what was added to a file since the last time, in whole lines; it may not exist yet."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._position = 0

    def read(self) -> list[str]:
        """Read the lines since the last call; an unfinished line waits for the next call."""
        new = _bytes_from(self._file, self._position)
        complete = new[: new.rfind(b"\n") + 1]
        self._position += len(complete)
        return complete.decode("utf-8", errors="replace").split("\n")[:-1]


def plain(text: str) -> str:
    """Drop the escape sequences that colour a log."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)


def last_error(text: str, lines: int = 15) -> str:
    """Find the end of the last traceback in a log, or else the log's own end; indented."""
    kept = [line.rstrip() for line in plain(text).splitlines()]
    kept = [line for line in kept if line and not NOISE.search(line)]
    begins = [index for index, line in enumerate(kept) if TRACEBACK in line]
    if begins:
        kept = kept[begins[-1] :]
        ends = (index for index, line in enumerate(kept) if LEVEL.search(line))
        kept = kept[: next(ends, len(kept))]
    return "\n".join(f"  {line}" for line in kept[-lines:])


Event = Mapping[str, Any]


class EventTail:
    """Reads the events that were added to a file since the last time; it may not exist yet."""

    def __init__(self, file: Path) -> None:
        self._lines = LineTail(file)
        self.failure = ""
        """Reason of a ``failed`` event, once there was one."""
        self.finished = False
        """Whether there was a ``finished`` event."""

    def read(self) -> list[Event]:
        """Read the events since the last call."""
        events = [_event(line) for line in self._lines.read() if line.strip()]
        for event in events:
            if event["event"] == "failed":
                self.failure = str(event.get("reason", ""))
            self.finished |= event["event"] == "finished"
        return events


def note(text: str) -> Event:
    """Make an event that is only a message."""
    return {"event": "note", "text": text, "time": time.time()}


def _event(line: str) -> Event:
    try:
        event = json.loads(line)
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            return event
    except ValueError:
        pass
    return note(f"A report that cannot be read: {line}")
