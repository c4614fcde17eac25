"""The books of a run: what phases cost, who could not be used, and what is told while it goes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from flwr.common.logger import log

from fedcompo.runtime import peak_bytes, reset_peak


@dataclass(frozen=True)
class Traffic:
    """What one phase cost one client, seen from the server."""

    bytes_sent: int
    """To the client."""
    bytes_received: int
    """From the client."""
    seconds: float
    """From the request's departure to the answer's arrival."""

    def __add__(self, other: Traffic) -> Traffic:
        """What two requests cost together."""
        return Traffic(
            self.bytes_sent + other.bytes_sent,
            self.bytes_received + other.bytes_received,
            self.seconds + other.seconds,
        )


NOTHING = Traffic(0, 0, 0.0)
"""What it costs not to be asked."""


@dataclass(frozen=True)
class LeftOut:
    """A client that could not be used, or not in this phase."""

    client: str
    phase: str
    reason: str


@dataclass(kw_only=True)
class Books:
    """Kept while a run goes, read when it is over."""

    events: Path
    """File to which each event is appended, one JSON object a line."""
    left_out: list[LeftOut] = field(default_factory=list)
    missed: list[LeftOut] = field(default_factory=list)
    """Who missed a phase that may be missed."""
    traffic: dict[str, dict[str, Traffic]] = field(default_factory=dict)
    """By phase and client."""
    caps: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By client, what it told of the caps it worked under, answer by answer, with the phase."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase."""
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    """Peak bytes by phase: ``server`` and ``client`` (the largest), resident; ``client_gpu``."""
    notes: list[str] = field(default_factory=list)
    """What whoever reads the results should know."""
    part: str = ""
    """Which of several like phases this is, such as ``round 3``; empty: there is but one."""

    def label(self, phase: str) -> str:
        """Name of a phase in the books: also says which of several like ones it is."""
        return f"{phase}, {self.part}" if self.part else phase

    def timed(self, phase: str, work: Callable[[], Any]) -> Any:
        """Do a phase that happens on the server, and book its time."""
        self.tell("phase-started", phase=phase, clients=[])
        reset_peak()
        started, label = time.monotonic(), self.label(phase)
        self.memory.setdefault(label, {})
        result = work()
        self._close(phase, started)
        log(INFO, "%s: %.1f s on the server", label, self.seconds[label])
        return result

    def note(self, text: str) -> None:
        """Say something to whoever follows the run, and in the results."""
        self.notes.append(text)
        self.tell("note", text=text)

    def tell(self, event: str, **entries: Any) -> None:
        """Append an event for whoever follows the run."""
        part = {"part": self.part} if self.part and "phase" in entries else {}
        line = json.dumps({"event": event, **entries, **part, "time": time.time()}, default=list)
        with self.events.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _close(self, phase: str, started: float) -> None:
        label, seconds = self.label(phase), time.monotonic() - started
        self.seconds[label] = self.seconds.get(label, 0.0) + seconds
        self._remember_peak(label, {"server": peak_bytes().get("resident", 0)})
        self.tell("phase-finished", phase=phase, seconds=round(seconds, 3))

    def _remember_peak(self, label: str, peaks: Mapping[str, int]) -> None:
        known = self.memory[label]
        known |= {who: max(int(peak), known.get(who, 0)) for who, peak in peaks.items()}

    def _say(self, phase: str, client: str, status: str, reason: str, cost: Traffic) -> None:
        """Tell of a client that could not be used."""
        self.tell(
            "client", phase=phase, client=client, status=status, reason=reason, **asdict(cost)
        )
        log(WARNING, "%s: %s is %s: %s", self.label(phase), client, status, reason)


def totals(traffic: Iterable[Traffic]) -> dict[str, int]:
    """Bytes of a phase in each direction."""
    costs = list(traffic)
    return {
        "bytes_sent": sum(cost.bytes_sent for cost in costs),
        "bytes_received": sum(cost.bytes_received for cost in costs),
    }
