"""Shows a simulation while it runs: as a table in a terminal, else as one line for each event."""

from __future__ import annotations

import pdb
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fedcompo.engine.log import SERVER, Event
from fedcompo.names import printable
from fedcompo.report.console import PlainConsole
from fedcompo.report.progress import LINE, Progress
from fedcompo.report.units import duration, shortened, size


class Standing(Enum):
    """State of a client in a phase."""

    RUNNING = "running"
    OK = "ok"
    LEFT_OUT = "left out"
    MISSED = "missed"


STANDINGS = {"ok": Standing.OK, "left-out": Standing.LEFT_OUT, "missed": Standing.MISSED}
"""By the ``status`` of an event."""


@dataclass(frozen=True)
class Cell:
    """A client in a phase."""

    standing: Standing
    since: float = 0.0
    """When it began, in seconds since 1970."""
    seconds: float = 0.0
    """How long it took, once it is over."""
    reason: str = ""
    part: str = ""
    """Which of several like phases it is, such as ``round 3``."""
    progress: Progress | None = None
    """How far it is, where it takes long."""

    def text(self, now: float) -> Text:
        """Text of the cell in the table."""
        part = f" ({self.part})" if self.part else ""
        if self.standing is Standing.RUNNING:
            return Text(f"running {duration(now - self.since)}{part}", style="yellow")
        if self.standing is Standing.OK:
            return Text(f"ok {duration(self.seconds)}{part}", style="green")
        style = "bold red" if self.standing is Standing.LEFT_OUT else "red"
        said = f"{self.standing.value.upper()}{part} {self.reason}".rstrip()
        return Text(printable(said), style=style)


@dataclass(frozen=True)
class State:
    """What is known of a run by its events so far; :meth:`after` returns the next state."""

    phases: tuple[str, ...] = ()
    clients: tuple[str, ...] = ()
    cells: Mapping[tuple[str, str], Cell] = field(default_factory=dict)
    """By client and phase; a client without a cell is waiting."""
    bytes_sent: int = 0
    bytes_received: int = 0

    def after(self, event: Event) -> State:
        """The state once this event has happened."""
        kind, phase = event["event"], str(event.get("phase", ""))
        if kind == "run":
            known = replace(self, phases=tuple(event.get("phases", ())))
            return known._with_clients(event.get("clients", ()))
        if kind == "phase-started":
            names = tuple(event.get("clients", ())) or (SERVER,)
            since, part = float(event.get("time", 0.0)), str(event.get("part", ""))
            running = Cell(Standing.RUNNING, since=since, part=part)
            return self._with_clients(names)._with({(name, phase): running for name in names})
        if kind == "client":
            return self._after_client(event, phase)
        if kind == "progress":
            return self._after_progress(str(event["client"]), Progress.of(event))
        if kind == "phase-finished":
            seconds, part = float(event.get("seconds", 0.0)), str(event.get("part", ""))
            return self._after_phase(phase, seconds, part)
        return self

    def _after_client(self, event: Event, phase: str) -> State:
        name, seconds = str(event["client"]), float(event.get("seconds", 0.0))
        standing = STANDINGS.get(str(event.get("status")), Standing.LEFT_OUT)
        reason = "" if standing is Standing.OK else str(event.get("reason", ""))
        cell = Cell(standing, seconds=seconds, reason=reason, part=str(event.get("part", "")))
        counted = replace(
            self,
            cells=self._cells_of_clients(phase),
            bytes_sent=self.bytes_sent + int(event.get("bytes_sent", 0)),
            bytes_received=self.bytes_received + int(event.get("bytes_received", 0)),
        )
        return counted._with_clients([name])._with({(name, phase): cell})

    def _after_progress(self, name: str, progress: Progress) -> State:
        """A client is in one phase at a time: that which runs, whatever it calls it."""
        for who in (name, SERVER):
            for (at, phase), cell in self.cells.items():
                if at == who and cell.standing is Standing.RUNNING:
                    cells = {(name, phase): replace(cell, progress=progress)}
                    kept = self.cells if who == name else self._cells_of_clients(phase)
                    return replace(self, cells=kept)._with_clients([name])._with(cells)
        return self

    def _cells_of_clients(self, phase: str) -> dict[tuple[str, str], Cell]:
        """A phase begun without names turns out to have clients: it is not the server's."""
        return {at: cell for at, cell in self.cells.items() if at != (SERVER, phase)}

    def _after_phase(self, phase: str, seconds: float, part: str) -> State:
        running = [
            name
            for (name, at), cell in self.cells.items()
            if at == phase and cell.standing is Standing.RUNNING
        ]
        own = Cell(Standing.OK, seconds=seconds, part=part)
        silent = Cell(Standing.LEFT_OUT, reason="no reply")
        return self._with({(name, phase): own if name == SERVER else silent for name in running})

    def _with_clients(self, names: tuple[str, ...] | list[str]) -> State:
        new = [name for name in names if name not in self.clients]
        return replace(self, clients=(*self.clients, *new))

    def _with(self, cells: Mapping[tuple[str, str], Cell]) -> State:
        new = [phase for _, phase in cells if phase not in self.phases]
        phases = (*self.phases, *dict.fromkeys(new))
        return replace(self, cells={**self.cells, **cells}, phases=phases)

    def at_work(self, most: int) -> list[str]:
        """How far those are whose work takes long; the last line counts those beyond the most."""
        running = [(n, c) for (n, _), c in self.cells.items() if c.standing is Standing.RUNNING]
        told = [f"{name} {cell.progress}" for name, cell in running if cell.progress][:most]
        rest = len(running) - len(told)
        return [*told, f"{rest} more to answer"] if told and rest else told

    def table(self, now: float, rows: int | None = None) -> Table:
        """Clients by phases.

        Args:
            now: In seconds since 1970.
            rows: At most so many: those that run, then those that failed; the last row counts the
                others. None: all clients.
        """
        traffic = f"sent {size(self.bytes_sent)}, received {size(self.bytes_received)}"
        table = Table(caption=traffic if self.bytes_sent or self.bytes_received else None)
        table.add_column("client", overflow="fold")
        for title in self.phases:
            table.add_column(title)
        shown, others = sorted(self.clients, key=lambda name: name == SERVER), list[str]()
        if rows is not None and rows < len(shown):
            urgent = sorted(shown, key=self._urgency)
            first, others = {*urgent[: rows - 1]}, urgent[rows - 1 :]
            shown = [name for name in shown if name in first]
        for name in shown:
            cells = [self.cells.get((name, phase)) for phase in self.phases]
            waiting = Text("" if name == SERVER else "waiting", style="dim")
            table.add_row(name, *(cell.text(now) if cell else waiting for cell in cells))
        if others:
            counts = [self._counts(others, phase) for phase in self.phases]
            table.add_row(f"{len(others)} more", *counts, style="dim")
        return table

    def _urgency(self, name: str) -> int:
        cells = (self.cells.get((name, phase)) for phase in self.phases)
        standings = {cell.standing for cell in cells if cell}
        return 0 if Standing.RUNNING in standings else 2 - bool(standings - {Standing.OK})

    def _counts(self, names: Sequence[str], phase: str) -> str:
        """How many of these clients are in which state in a phase."""
        cells = (self.cells.get((name, phase)) for name in names)
        counts = Counter(cell.standing.value if cell else "waiting" for cell in cells)
        return ", ".join(f"{count} {standing}" for standing, count in counts.most_common())


class Display:
    """Shows events as they come; used as a context, so that a terminal is left tidy."""

    def __init__(self, console: PlainConsole) -> None:
        self._console = console
        self._state = State()
        self._began = self._written = time.time()
        self._spinner = Spinner("dots")
        self._live = (
            Live(get_renderable=self._render, console=console, refresh_per_second=4)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
            self._breakpointhook, sys.breakpointhook = sys.breakpointhook, self._at_breakpoint
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()
            sys.breakpointhook = self._breakpointhook

    def _at_breakpoint(self) -> None:
        """Leave the terminal to the debugger, which stops where `breakpoint()` stands."""
        if self._live:
            self._live.stop()
        pdb.Pdb().set_trace(sys._getframe(1))

    def show(self, event: Event) -> None:
        """Show one event."""
        self._state = self._state.after(event)
        if event["event"] == "progress":
            if self._live or time.time() - self._written < LINE:
                return
            self._written = time.time()
            told = self._state.at_work(3) or [f"{event['client']} {Progress.of(event)}"]
            event = {**event, "event": "note", "text": "; ".join(told)}
        if not self._live or event["event"] == "note":
            self._console.print(line(event, self._began), soft_wrap=True)

    def _render(self) -> RenderableType:
        now = time.time()
        elapsed = f" {duration(now - self._began)} since the start"
        self._spinner.update(text=Text(elapsed, style="dim"))
        if not self._state.clients:
            return self._spinner
        room = self._console.size.height - 2  # for the spinner, and an empty line
        at_work = self._state.at_work(room // 3)
        lines = [Text(printable(line), no_wrap=True, overflow="ellipsis") for line in at_work]
        room -= len(lines)
        rows, over = room, 1
        while over > 0 and rows > 1:  # cells may be broken into several lines
            table = self._state.table(now, rows)
            over = len(self._console.render_lines(table)) - room
            rows -= max(1, over // 4)
        return Group(table, *lines, self._spinner)


def line(event: Event, began: float) -> str:
    """One event as a line of text; the run ``began`` at this time, in seconds since 1970."""
    stamp = f"[{max(0.0, float(event.get('time', began)) - began):6.1f} s]"
    return f"{stamp} {_described(event)}"


def _described(event: Event) -> str:
    kind, phase = event["event"], event.get("phase", "")
    if part := event.get("part"):
        phase = f"{phase}, {part}"
    names = shortened(event.get("clients", ()), 200)
    took = duration(float(event.get("seconds", 0.0)))
    if kind == "run":
        return f"run: {' -> '.join(event.get('phases', ()))}" + (f"; {names}" if names else "")
    if kind == "phase-started":
        return f"{phase}: started" + (f" with {names}" if names else "")
    if kind == "client" and event.get("status") == "ok":
        sent, received = (size(event.get(f"bytes_{way}", 0)) for way in ("sent", "received"))
        return f"{phase}: {event['client']} ok, {took}, sent {sent}, received {received}"
    if kind == "client":
        standing = STANDINGS.get(event.get("status", ""), Standing.LEFT_OUT).value.upper()
        return f"{phase}: {event['client']} {standing}: {event.get('reason', '')}"
    if kind == "phase-finished":
        return f"{phase}: finished, {took}"
    if kind == "failed":
        return f"failed: {event.get('reason', '')}"
    return "finished" if kind == "finished" else str(event.get("text", kind))
