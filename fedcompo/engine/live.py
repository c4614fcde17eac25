"""Shows a simulation while it runs: as a table in a terminal, else as one line for each event."""

from __future__ import annotations

import pdb
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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

RUNNING, OK, LEFT_OUT = "running", "ok", "left-out"
"""States of a client in a phase; but for the first, they are the ``status`` of an event."""


@dataclass(frozen=True)
class Cell:
    """A client in a phase."""

    standing: str
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
        if self.standing == RUNNING:
            return Text(f"running {duration(now - self.since)}{part}", style="yellow")
        if self.standing == OK:
            return Text(f"ok {duration(self.seconds)}{part}", style="green")
        said = f"{_loud(self.standing)}{part} {self.reason}".rstrip()
        return Text(printable(said), style="bold red" if self.standing == LEFT_OUT else "red")


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
        seconds, part = float(event.get("seconds", 0.0)), str(event.get("part", ""))
        if kind == "run":
            return replace(self, phases=tuple(event["phases"]))._with({}, event["clients"])
        if kind == "phase-started":
            running = Cell(RUNNING, since=float(event.get("time", 0.0)), part=part)
            names = event.get("clients") or (SERVER,)
            return self._with({(name, phase): running for name in names})
        if kind == "client":
            sent, received = (int(event.get(f"bytes_{way}", 0)) for way in ("sent", "received"))
            cell = Cell(event["status"], 0.0, seconds, str(event.get("reason", "")), part)
            counted = replace(
                self._of_clients(phase),
                bytes_sent=self.bytes_sent + sent,
                bytes_received=self.bytes_received + received,
            )
            return counted._with({(str(event["client"]), phase): cell})
        if kind == "progress":
            return self._after_progress(str(event["client"]), Progress.of(event))
        if kind == "phase-finished":
            own, silent = Cell(OK, 0.0, seconds, "", part), Cell(LEFT_OUT, reason="no reply")
            left = [at for at, c in self.cells.items() if at[1] == phase and c.standing == RUNNING]
            return self._with({at: own if at[0] == SERVER else silent for at in left})
        return self

    def _after_progress(self, name: str, progress: Progress) -> State:
        """A client is in one phase at a time: that which runs, whatever it calls it."""
        for who in (name, SERVER):
            for (at, phase), cell in self.cells.items():
                if at == who and cell.standing == RUNNING:
                    before = self if who == name else self._of_clients(phase)
                    return before._with({(name, phase): replace(cell, progress=progress)})
        return self

    def _of_clients(self, phase: str) -> State:
        """A phase begun without names turns out to have clients: it is not the server's."""
        cells = {at: cell for at, cell in self.cells.items() if at != (SERVER, phase)}
        return replace(self, cells=cells)

    def _with(self, cells: Mapping[tuple[str, str], Cell], clients: Iterable[str] = ()) -> State:
        names = dict.fromkeys([*self.clients, *clients, *(name for name, _ in cells)])
        phases = dict.fromkeys([*self.phases, *(phase for _, phase in cells)])
        cells = {**self.cells, **cells}
        return replace(self, cells=cells, clients=tuple(names), phases=tuple(phases))

    def at_work(self, most: int) -> list[str]:
        """How far those are whose work takes long; the last line counts those beyond the most."""
        running = [(n, c) for (n, _), c in self.cells.items() if c.standing == RUNNING]
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
            table.add_row(name, *(self._cell(name, phase, now) for phase in self.phases))
        if others:
            counts = [self._counts(others, phase) for phase in self.phases]
            table.add_row(f"{len(others)} more", *counts, style="dim")
        return table

    def _cell(self, name: str, phase: str, now: float) -> Text:
        if cell := self.cells.get((name, phase)):
            return cell.text(now)
        alone = name == SERVER or (SERVER, phase) in self.cells  # nobody waits for this phase
        return Text("" if alone else "waiting", style="dim")

    def _urgency(self, name: str) -> int:
        cells = (self.cells.get((name, phase)) for phase in self.phases)
        standings = {cell.standing for cell in cells if cell}
        return 0 if RUNNING in standings else 2 - bool(standings - {OK})

    def _counts(self, names: Sequence[str], phase: str) -> str:
        """How many of these clients are in which state in a phase."""
        cells = (self.cells.get((name, phase)) for name in names)
        counts = Counter(cell.standing if cell else "waiting" for cell in cells)
        return ", ".join(f"{count} {_loud(s).lower()}" for s, count in counts.most_common())


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


def _loud(status: str) -> str:
    return status.upper().replace("-", " ")


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
        return f"{phase}: {event['client']} {_loud(event['status'])}: {event.get('reason', '')}"
    if kind == "phase-finished":
        return f"{phase}: finished, {took}"
    if kind == "failed":
        return f"failed: {event.get('reason', '')}"
    return "finished" if kind == "finished" else str(event.get("text", kind))
