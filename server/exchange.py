"""One request to every client, one answer at a time: who answered, how much, how long, who did not.

A client is known by its name, never by Flower's node id. One that raises, answers nonsense or does
not answer in time is left out of all that follows, and named with the reason.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedcompo.errors import FedcompoError, TooFewClients
from fedcompo.memory import peak_bytes, reset_peak
from fedcompo.messages import Body, from_record, size_of, to_record

Fold = Callable[[str, Body], str]
"""Takes a client's name and answer; checks it, *then* keeps what is needed; returns the name under
which the client is to be known. Raises to refuse it, and then has kept nothing."""
Waiting = tuple[str, int, float]
"""Client, bytes sent, when."""
NAMING = ("features", "identify")
"""Phases in which clients are first called by their names."""
POLL = 0.1, 2.0
"""Seconds between looks for an answer: at first, and at most."""


@dataclass(frozen=True)
class Traffic:
    """What one phase cost one client, seen from the server."""

    bytes_sent: int
    """To the client."""
    bytes_received: int
    """From the client."""
    seconds: float
    """From the request's departure to the answer's arrival."""


@dataclass(frozen=True)
class LeftOut:
    """A client that could not be used."""

    client: str
    phase: str
    reason: str


@dataclass
class Exchange:
    """Talks to the clients of a run and keeps the books."""

    grid: Grid
    timeout: float
    min_clients: int
    events: Path
    """File to which each event is appended, one JSON object a line."""
    nodes: dict[str, int] = field(default_factory=dict)
    """Flower's node id by client name; those left out are gone."""
    left_out: list[LeftOut] = field(default_factory=list)
    traffic: dict[str, dict[str, Traffic]] = field(default_factory=dict)
    """By phase and client."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase."""
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    """Peak bytes by phase: ``server`` and ``client`` (the largest), resident; ``client_gpu``."""
    notes: list[str] = field(default_factory=list)
    """What whoever reads the results should know."""
    registered: dict[int, str] = field(default_factory=dict)
    """Names under which the SuperLink knows nodes, by node id."""

    @property
    def clients(self) -> tuple[str, ...]:
        """Names of the clients still in the run, sorted."""
        return tuple(sorted(self.nodes))

    def gather(self, wanted: int) -> None:
        """Wait for clients to connect.

        Args:
            wanted: Number of clients; 0: all that are there once nobody new comes for 3 seconds.

        Raises:
            TooFewClients: If fewer than ``min_clients`` come in time.
        """
        started, last_change, known = time.monotonic(), time.monotonic(), -1
        while True:
            nodes = list(self.grid.get_nodes())
            now = time.monotonic()
            if len(nodes) != known:
                known, last_change = len(nodes), now
            settled = not wanted and known >= self.min_clients and now - last_change > 3
            if settled or (wanted and known >= wanted):
                break
            if now - started > self.timeout and known >= self.min_clients:
                text = f"{known} of {wanted} client(s) connected within {self.timeout:g} s."
                self.note(text)
                break
            if now - started > self.timeout:
                raise TooFewClients(
                    f"{known} client(s) connected within {self.timeout:g} s, expected at least "
                    f"{self.min_clients} (`min-clients`). Start more clients, or raise `timeout`."
                )
            time.sleep(0.5)
        self.registered = {node.node_id: node.name for node in nodes if node.name}
        self.nodes = {f"node {node.node_id}": node.node_id for node in nodes}

    def ask(
        self,
        phase: str,
        message_type: str,
        request: Callable[[str], Body],
        fold: Fold,
        *,
        decisive: bool = True,
        clients: Iterable[str] | None = None,
    ) -> None:
        """Send clients a request and fold their answers in, one at a time.

        Args:
            phase: Name of the phase, for people.
            message_type: Flower's, such as ``query.features``.
            request: Makes the tensors and manifest for a client, by its name.
            fold: Takes each answer.
            decisive: Fail if fewer than ``min_clients`` remain.
            clients: Whom to ask; None: everyone still in the run.

        Raises:
            TooFewClients: If too few usable answers came.
        """
        reset_peak()
        started = time.monotonic()
        self.traffic[phase], self.memory[phase], waiting = {}, {}, {}
        asked = self.clients if clients is None else tuple(sorted(clients))
        self.tell("phase-started", phase=phase, clients=[] if phase in NAMING else asked)
        for client in asked:
            message_id, sent = self._send(client, message_type, request(client))
            if message_id:
                waiting[message_id] = client, sent, time.monotonic()
            else:
                self.leave_out(phase, client, "its node is gone", Traffic(sent, 0, 0.0))
        self._collect(phase, message_type.rpartition(".")[2], waiting, fold)
        for client, sent, departed in waiting.values():
            reason = f"no answer within {self.timeout:g} s"
            self.leave_out(phase, client, reason, Traffic(sent, 0, time.monotonic() - departed))
        self._close(phase, started)
        log(INFO, "%s: %d client(s), %.1f s", phase, len(self.traffic[phase]), self.seconds[phase])
        if decisive:
            self.require_clients(phase)

    def require_clients(self, phase: str) -> None:
        """Raise ``TooFewClients``, naming everyone left out, if too few remain."""
        if len(self.nodes) >= self.min_clients:
            return
        reasons = "\n".join(f"  - {o.client} ({o.phase}): {o.reason}" for o in self.left_out)
        raise TooFewClients(
            f"{len(self.nodes)} usable client(s) after the phase {phase!r}, `min-clients` is "
            f"{self.min_clients}. Left out:\n{reasons or '  nobody'}"
        )

    def timed(self, phase: str, work: Callable[[], Any]) -> Any:
        """Do a phase that happens on the server, and book its time."""
        self.tell("phase-started", phase=phase, clients=[])
        reset_peak()
        started, self.memory[phase] = time.monotonic(), {}
        result = work()
        self._close(phase, started)
        log(INFO, "%s: %.1f s on the server", phase, self.seconds[phase])
        return result

    def note(self, text: str) -> None:
        """Say something to whoever follows the run, and in the results."""
        self.notes.append(text)
        self.tell("note", text=text)

    def tell(self, event: str, **entries: Any) -> None:
        """Append an event for whoever follows the run."""
        line = json.dumps({"event": event, **entries, "time": time.time()}, default=list)
        with self.events.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _close(self, phase: str, started: float) -> None:
        self.seconds[phase] = time.monotonic() - started
        self._remember_peak(phase, {"server": peak_bytes().get("resident", 0)})
        self.tell("phase-finished", phase=phase, seconds=round(self.seconds[phase], 3))

    def _remember_peak(self, phase: str, peaks: Mapping[str, int]) -> None:
        known = self.memory[phase]
        known |= {who: max(int(peak), known.get(who, 0)) for who, peak in peaks.items()}

    def _send(self, client: str, message_type: str, body: Body) -> tuple[str, int]:
        """Send a request; returns the message's id, empty if the node is gone, and its size."""
        tensors, manifest = body
        node = self.nodes[client]
        name = self.registered.get(node, "")
        content = to_record(tensors, {"content": "request", "registered_name": name, **manifest})
        message = Message(content, node, message_type, ttl=self.timeout)
        ids = list(self.grid.push_messages([message]))
        return ids[0] if ids else "", size_of(content)

    def _collect(self, phase: str, expected: str, waiting: dict[str, Waiting], fold: Fold) -> None:
        """Take answers as they come, until none is awaited or the time is over."""
        pause, deadline = POLL[0], time.monotonic() + self.timeout
        while waiting and time.monotonic() < deadline:
            answered = False
            for message_id in list(waiting):
                for reply in self.grid.pull_messages([message_id]):
                    client, sent, departed = waiting.pop(message_id)
                    cost = Traffic(sent, _received(reply), time.monotonic() - departed)
                    self._take(phase, expected, client, reply, cost, fold)
                    answered = True
            pause = POLL[0] if answered else min(1.2 * pause, POLL[1])
            if waiting:
                time.sleep(pause)

    def _take(
        self, phase: str, expected: str, client: str, reply: Message, cost: Traffic, fold: Fold
    ) -> None:
        """Fold one reply in, or leave its client out."""
        if reply.has_error():
            reason = f"code {reply.error.code}: {reply.error.reason or 'no reason given'}"
            self.leave_out(phase, client, reason, cost)
            return
        try:
            body = from_record(reply.content, expected=expected, source=f"client {client!r}")
            peak = {who: int(count) for who, count in body[1]["peak_memory"].items()}
            name = fold(client, body)
        except FedcompoError as error:
            self.leave_out(phase, client, str(error), cost)
            return
        except Exception as error:  # whatever a strange answer can provoke
            reason = f"its answer is malformed ({type(error).__name__}: {error})"
            self.leave_out(phase, client, reason, cost)
            return
        self._remember_peak(
            phase, {"client": peak.get("resident", 0), "client_gpu": peak.get("gpu", 0)}
        )
        if name != client:
            self.nodes[name] = self.nodes.pop(client)
        self.traffic[phase][name] = cost
        self.tell("client", phase=phase, client=name, status="ok", reason="", **asdict(cost))
        log(
            INFO,
            "%s: %s answered with %d bytes in %.1f s",
            phase,
            name,
            cost.bytes_received,
            cost.seconds,
        )

    def leave_out(self, phase: str, client: str, reason: str, cost: Traffic) -> None:
        """Take a client out of all that follows, and say why."""
        del self.nodes[client]
        self.left_out.append(LeftOut(client, phase, reason))
        self.tell(
            "client", phase=phase, client=client, status="left-out", reason=reason, **asdict(cost)
        )
        log(WARNING, "%s: %s is left out: %s", phase, client, reason)


def totals(traffic: Iterable[Traffic]) -> dict[str, int]:
    """Bytes of a phase in each direction."""
    costs = list(traffic)
    return {
        "bytes_sent": sum(cost.bytes_sent for cost in costs),
        "bytes_received": sum(cost.bytes_received for cost in costs),
    }


def _received(reply: Message) -> int:
    content = reply.content if reply.has_content() else RecordDict()
    return size_of(content)
