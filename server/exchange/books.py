"""The books of a run: what each phase cost, which clients could not be used, and its events."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from logging import INFO, WARNING
from pathlib import Path
from typing import Any, TypeVar

from flwr.common.logger import log

from fedcompo.names import printable
from fedcompo.runtime import peak_bytes, reset_peak

T = TypeVar("T")
LONGEST = 2000
"""Characters of a reason or a note."""


@dataclass(frozen=True)
class Traffic:
    """What one phase cost for one client, measured at the server."""

    bytes_sent: int
    """To the client."""
    bytes_received: int
    """From the client."""
    seconds: float
    """From the request's departure to the answer's arrival."""

    def __add__(self, other: Traffic) -> Traffic:
        """The cost of two requests together."""
        return Traffic(
            self.bytes_sent + other.bytes_sent,
            self.bytes_received + other.bytes_received,
            self.seconds + other.seconds,
        )


NOTHING = Traffic(0, 0, 0.0)
"""The cost of no request."""


@dataclass(frozen=True)
class LeftOut:
    """A client that could not be used, or not in this phase."""

    client: str
    phase: str
    reason: str


@dataclass
class Books:
    """Written while a run goes, read when it is over."""

    events: Path
    """File to which each event is appended, one JSON object a line."""
    started: float = field(default_factory=time.time)
    """When the run began, in seconds since 1970."""
    left_out: list[LeftOut] = field(default_factory=list)
    missed: list[LeftOut] = field(default_factory=list)
    """Clients that missed a phase that may be missed."""
    traffic: dict[str, dict[str, Traffic]] = field(default_factory=dict)
    """By label of the phase, and client."""
    caps: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By client, what each answer reported of its caps, and the answer's phase."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By label of the phase."""
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    """Peak bytes by phase: ``server`` and ``client`` (the largest), resident; ``client_gpu``."""
    notes: list[str] = field(default_factory=list)
    """For whoever reads the results."""
    follow: Callable[[Mapping[str, Any]], None] = lambda event: None
    """Is told each event, once it is written."""
    part: str = ""
    """Where phases repeat, which part of the run this is, such as ``round 3``; else empty."""

    def label(self, phase: str) -> str:
        """Name of a phase in the books: with the part of the run, where phases repeat."""
        return f"{phase}, {self.part}" if self.part else phase

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Book what happens inside as this part of the run, such as ``round 3``."""
        self.part = part
        try:
            yield
        finally:
            self.part = ""

    # -- phases -----------------------------------------------------------------------------------

    def begin(self, phase: str, clients: Iterable[str] = ()) -> float:
        """Open a phase; returns when it began. The clients asked are those known by name."""
        self.tell("phase-started", phase=phase, clients=clients)
        reset_peak()
        self.memory.setdefault(self.label(phase), {})
        return time.monotonic()

    def end(self, phase: str, started: float) -> None:
        """Close a phase that :meth:`begin` opened; book its time and the server's memory."""
        label, seconds = self.label(phase), time.monotonic() - started
        self.seconds[label] = self.seconds.get(label, 0.0) + seconds
        self._remember_peak(label, {"server": peak_bytes().get("resident", 0)})
        self.tell("phase-finished", phase=phase, seconds=round(seconds, 3))

    def timed(self, phase: str, work: Callable[[], T]) -> T:
        """Do a phase that happens on the server, and book its time."""
        started = self.begin(phase)
        result = work()
        self.end(phase, started)
        label = self.label(phase)
        log(INFO, "%s: %.1f s on the server", label, self.seconds[label])
        return result

    # -- clients ----------------------------------------------------------------------------------

    def answered(
        self,
        phase: str,
        client: str,
        cost: Traffic,
        *,
        peaks: Mapping[str, int],
        caps: Iterable[Mapping[str, Any]],
        figures: Mapping[str, Any],
        reason: str = "",
    ) -> None:
        """Book an answer that was used; the costs of two answers in one phase add up.

        The client reports its caps, its peak memory in bytes, and perhaps losses and accuracies; a
        reason is for people.
        """
        label = self.label(phase)
        self._remember_peak(label, peaks)
        self.traffic[label][client] = self.traffic[label].get(client, NOTHING) + cost
        for own in caps:
            self.caps.setdefault(client, []).append({**own, "phase": label})
        about = {"phase": phase, "client": client, "status": "ok", "reason": reason}
        self.tell("client", **about, **asdict(cost), **({"figures": figures} if figures else {}))
        size, seconds = cost.bytes_received, cost.seconds
        log(INFO, "%s: %s answered with %d bytes in %.1f s", label, client, size, seconds)

    def miss(self, phase: str, client: str, reason: str, cost: Traffic = NOTHING) -> None:
        """Book that a client misses this phase alone, and why."""
        self._go_without(self.missed, "missed", phase, client, reason, cost)

    def leave_out(self, phase: str, client: str, reason: str, cost: Traffic = NOTHING) -> None:
        """Book that a client is out of all that follows, and why."""
        self._go_without(self.left_out, "left-out", phase, client, reason, cost)

    # -- for whoever follows the run --------------------------------------------------------------

    def note(self, text: str) -> None:
        """Write a note for whoever follows the run, and into the results; once; none if empty."""
        text = _said(text)
        if text not in ("", *self.notes):
            self.notes.append(text)
            self.tell("note", text=text)

    def tell(self, event: str, **entries: Any) -> None:
        """Append an event to the file of events."""
        part = {"part": self.part} if self.part and "phase" in entries else {}
        told = {"event": event, **entries, **part, "time": time.time()}
        with self.events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(told, default=list) + "\n")
        self.follow(told)

    def _go_without(
        self,
        listed: list[LeftOut],
        status: str,
        phase: str,
        client: str,
        reason: str,
        cost: Traffic,
    ) -> None:
        reason, label = _said(reason), self.label(phase)
        listed.append(LeftOut(client, label, reason))
        about = {"phase": phase, "client": client, "status": status, "reason": reason}
        self.tell("client", **about, **asdict(cost))
        log(WARNING, "%s: %s is %s: %s", label, client, status, reason)

    def _remember_peak(self, label: str, peaks: Mapping[str, int]) -> None:
        known = self.memory[label]
        known |= {who: max(int(peak), known.get(who, 0)) for who, peak in peaks.items()}


def _said(text: str) -> str:
    """One printable line of what a client may have had a say in; never endless."""
    shown = printable(text)
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]} …"


def totals(traffic: Iterable[Traffic]) -> dict[str, int]:
    """Bytes in each direction, over all clients."""
    costs = list(traffic)
    return {
        "bytes_sent": sum(cost.bytes_sent for cost in costs),
        "bytes_received": sum(cost.bytes_received for cost in costs),
    }
