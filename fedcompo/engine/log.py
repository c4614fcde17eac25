"""Reading the log of Flower's engine: what went wrong, without the noise around it.

What a run reports while it goes: one JSON object a line, appended to a file by the server.

==================  =====================================================================
``event``           with
==================  =====================================================================
``run``             ``clients`` (names, may be empty), ``phases``
``phase-started``   ``phase``, ``clients``
``client``          ``phase``, ``client``, ``status`` (``ok``, ``left-out``, ``missed``),
                    ``reason``, ``bytes_sent``, ``bytes_received``, ``seconds``
``phase-finished``  ``phase``, ``seconds``
``note``            ``text``
``finished``        ``results`` (name of the file)
``failed``          ``reason``
==================  =====================================================================

Each also has ``time``, in seconds since 1970. Of several like phases, such as rounds, those that
have a ``phase`` also say in ``part`` which it is: ``round 3``.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TRACEBACK = "Traceback (most recent call last)"
NOISE = re.compile(
    r"\[uvicorn\.access\]|\.(ListRuns|StreamLogs|StartRun)$|Exit Code: \d+$"
    r"|^An unhandled exception occurred|^For more information, visit"
)
LEVEL = re.compile(r"^(DEBUG|INFO|WARNING|ERROR)\s*:|^\d{4}-\d\d-\d\dT")


def read_from(file: Path, position: int) -> str:
    """The text of a file from a byte on; empty if there is no file."""
    if not file.exists():
        return ""
    with file.open("rb") as stream:
        stream.seek(position)
        return stream.read().decode("utf-8", errors="replace")


class LineTail:
    """Reads what has been added to a file, whole lines at a time.

    Args:
        file: May not exist yet.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._position = 0

    def read(self) -> list[str]:
        """The lines since the last call; one that is still being written waits for the next."""
        if not self._file.exists():
            return []
        with self._file.open("rb") as stream:
            stream.seek(self._position)
            new = stream.read()
        complete = new[: new.rfind(b"\n") + 1]
        self._position += len(complete)
        return complete.decode("utf-8", errors="replace").split("\n")[:-1]


def plain(text: str) -> str:
    """Drop the escape sequences that colour a log."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)


def last_error(text: str, lines: int = 15) -> str:
    """The end of the last traceback in a log, or of the log if it holds none; indented."""
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
    """Reads what has been added to a file of events.

    Args:
        file: May not exist yet.
    """

    def __init__(self, file: Path) -> None:
        self._lines = LineTail(file)
        self.failure = ""
        """Reason of a ``failed`` event, once there was one."""

    def read(self) -> list[Event]:
        """The events since the last call."""
        events = [_event(line) for line in self._lines.read() if line.strip()]
        for event in events:
            if event["event"] == "failed":
                self.failure = str(event.get("reason", ""))
        return events


def note(text: str) -> Event:
    """An event that only says something."""
    return {"event": "note", "text": text, "time": time.time()}


def _event(line: str) -> Event:
    try:
        event = json.loads(line)
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            return event
    except ValueError:
        pass
    return note(f"A report that cannot be read: {line}")
