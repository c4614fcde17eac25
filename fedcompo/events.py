"""What a run reports while it goes: one JSON object a line, appended to a file by the server.

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
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedcompo.engine.log import LineTail

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
