"""One request to every client, one answer at a time: who answered, how much, how long, who did not.

A client is known by its name, never by Flower's node id. One that raises, answers nonsense or does
not answer in time is left out of all that follows, and named with the reason; where a phase may be
missed (a round of many), it misses that one, and is named too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from logging import INFO

from flwr.app import Message, RecordDict
from flwr.common.logger import log

from fedcompo.errors import FedcompoError, TooFewClients
from fedcompo.messages.answers import Process
from fedcompo.messages.body import Body
from fedcompo.messages.records import from_record, size_of, to_record
from fedcompo.messages.requests import addressed
from fedcompo.runtime import reset_peak
from server.exchange.books import NOTHING, LeftOut, Traffic
from server.exchange.checks import checked_caps
from server.exchange.kept_answers import Answers, question
from server.exchange.nodes import Nodes

Fold = Callable[[str, Body], str]
"""Takes a client's name and answer; checks it, *then* keeps what is needed; returns the name under
which the client is to be known. Raises to refuse it, and then has kept nothing."""
NAMING = ("features", "identify")
"""Phases in which clients are first called by their names."""
POLL = 0.1, 2.0
"""Seconds between looks for an answer: at first, and at most."""


@dataclass
class Exchange(Nodes):
    """Talks to the clients of a run and keeps the books."""

    in_flight: int = 0
    """Requests under way at a time; 0: all. What waits to be folded in is no more than these."""
    answers: Answers | None = None
    """Answers of a run that may be interrupted; None: it starts anew then."""

    def ask(
        self,
        phase: str,
        message_type: str,
        request: Callable[[str], Body],
        fold: Fold,
        *,
        decisive: bool = True,
        may_miss: bool = False,
        clients: Iterable[str] | None = None,
    ) -> None:
        """Send clients a request and fold their answers in, one at a time.

        Args:
            phase: Name of the phase, for people.
            message_type: Flower's, such as ``query.features``.
            request: Makes the tensors and manifest for a client, by its name.
            fold: Takes each answer.
            decisive: Fail if fewer than ``min_clients`` remain.
            may_miss: Who cannot be used misses this phase, and is not left out of the next.
            clients: Whom to ask; None: everyone still in the run.

        Raises:
            TooFewClients: If too few usable answers came.
        """
        reset_peak()
        started, label = time.monotonic(), self.label(phase)
        self.traffic.setdefault(label, {})
        self.memory.setdefault(label, {})
        asked = self.clients if clients is None else tuple(sorted(clients))
        self.tell("phase-started", phase=phase, clients=[] if phase in NAMING else asked)
        asking = _Asking(phase, message_type, request, fold, may_miss)
        for client in asked:
            while self.in_flight and len(asking.waiting) >= self.in_flight:
                self._collect(asking, most=self.in_flight - 1)
            self._send(client, asking)
        self._collect(asking, most=0)
        self._close(phase, started)
        log(INFO, "%s: %d client(s), %.1f s", label, len(self.traffic[label]), self.seconds[label])
        if decisive:
            self.require_clients(phase)

    def require_clients(self, phase: str, usable: Collection[str] | None = None) -> None:
        """Raise ``TooFewClients``, naming everyone who could not be used, if too few remain.

        Args:
            phase: What they have gone through.
            usable: Who remains; None: everyone still in the run.
        """
        count = len(self.nodes if usable is None else usable)
        if count >= self.min_clients:
            return
        missed = [m for m in self.missed if m.phase.partition(",")[0] == phase]
        reasons = [f"  - {o.client} ({o.phase}): {o.reason}" for o in (*self.left_out, *missed)]
        raise TooFewClients(
            f"{count} usable client(s) after the phase {phase!r}, `min-clients` is "
            f"{self.min_clients}. Left out:\n" + ("\n".join(reasons) or "  nobody")
        )

    def _send(self, client: str, asking: _Asking) -> None:
        """Send a client its request, unless its answer is known already."""
        tensors, manifest = asking.request(client)
        asked = "" if self.answers is None else question((tensors, manifest))
        if self._recalled(client, asking, asked):
            return
        node = self.nodes[client]
        name = self.registered.get(node, "")
        content = to_record(*addressed((tensors, manifest), name))
        message = Message(content, node, asking.message_type, ttl=self.timeout)
        ids, sent = list(self.grid.push_messages([message])), size_of(content)
        if ids and ids[0]:
            asking.waiting[ids[0]] = _Waiting(client, asked, sent, time.monotonic())
        else:
            self._fail(asking, client, "its node is gone", Traffic(sent, 0, 0.0))

    def _recalled(self, client: str, asking: _Asking, asked: str) -> bool:
        """Whether a client's answer was kept, when this run was interrupted, and still serves."""
        kept = self.answers and self.answers.recall(self.label(asking.phase), client, asked)
        if not kept:
            return False
        body, cost = kept
        try:
            name = asking.fold(client, body)
        except FedcompoError as error:
            log(INFO, "%s is asked again: its kept answer does not serve: %s", client, error)
            return False
        self._book(asking, client, name, body, cost, reason="answered before the interruption")
        return True

    def _collect(self, asking: _Asking, *, most: int) -> None:
        """Take answers as they come, until no more than so many are awaited, or their time is over.

        An answer's time runs from its own request's departure.
        """
        pause, waiting = POLL[0], asking.waiting
        while len(waiting) > most:
            answered = False
            for message_id in list(waiting):
                for reply in self.grid.pull_messages([message_id]):
                    self._take(asking, waiting.pop(message_id), reply)
                    answered = True
            self._give_up(asking)
            pause = POLL[0] if answered else min(1.2 * pause, POLL[1])
            if len(waiting) > most:
                time.sleep(pause)

    def _give_up(self, asking: _Asking) -> None:
        """Wait no longer for answers whose time is over."""
        for message_id, awaited in list(asking.waiting.items()):
            seconds = time.monotonic() - awaited.departed
            if seconds >= self.timeout:
                del asking.waiting[message_id]
                reason = f"no answer within {self.timeout:g} s"
                self._fail(asking, awaited.client, reason, Traffic(awaited.sent, 0, seconds))

    def _take(self, asking: _Asking, awaited: _Waiting, reply: Message) -> None:
        """Fold one reply in, or do without its client."""
        client, seconds = awaited.client, time.monotonic() - awaited.departed
        cost = Traffic(awaited.sent, _received(reply), seconds)
        if reply.has_error():
            reason = f"code {reply.error.code}: {reply.error.reason or 'no reason given'}"
            self._fail(asking, client, reason, cost)
            return
        try:
            body = from_record(reply.content, expected=asking.expected, source=f"client {client!r}")
            _peaks(body)
            checked_caps(client, body)
            name = asking.fold(client, body)
        except FedcompoError as error:
            self._fail(asking, client, str(error), cost)
            return
        except OSError:  # what fails is this server's disk: no fault of the client's
            raise
        except Exception as error:  # whatever a strange answer can provoke
            reason = f"its answer is malformed ({type(error).__name__}: {error})"
            self._fail(asking, client, reason, cost)
            return
        if self.answers is not None:
            self.answers.keep(self.label(asking.phase), name, awaited.asked, body, cost)
        self._book(asking, client, name, body, cost)

    def _book(
        self, asking: _Asking, client: str, name: str, body: Body, cost: Traffic, reason: str = ""
    ) -> None:
        """Enter an answer that was folded in."""
        phase, label = asking.phase, self.label(asking.phase)
        self._remember_peak(label, _peaks(body))
        if name != client:
            self.nodes[name] = self.nodes.pop(client)
        before = self.traffic[label].get(name)
        self.traffic[label][name] = cost if before is None else before + cost
        if told := checked_caps(name, body):
            self.caps.setdefault(name, []).append({**told, "phase": label})
        self.tell("client", phase=phase, client=name, status="ok", reason=reason, **asdict(cost))
        size, seconds = cost.bytes_received, cost.seconds
        log(INFO, "%s: %s answered with %d bytes in %.1f s", label, name, size, seconds)

    def _fail(self, asking: _Asking, client: str, reason: str, cost: Traffic) -> None:
        """Do without a client: in this phase, or in all that follow."""
        do_without = self.miss if asking.may_miss else self.leave_out
        do_without(asking.phase, client, reason, cost)

    def miss(self, phase: str, client: str, reason: str, cost: Traffic = NOTHING) -> None:
        """Do without a client in this phase alone, and say why."""
        self.missed.append(LeftOut(client, self.label(phase), reason))
        self._say(phase, client, "missed", reason, cost)

    def leave_out(self, phase: str, client: str, reason: str, cost: Traffic = NOTHING) -> None:
        """Take a client out of all that follows, and say why."""
        del self.nodes[client]
        self.left_out.append(LeftOut(client, self.label(phase), reason))
        self._say(phase, client, "left-out", reason, cost)


@dataclass(frozen=True)
class _Waiting:
    """A request that has not been answered yet."""

    client: str
    asked: str
    """:func:`server.exchange.kept_answers.question` of it."""
    sent: int
    """Bytes."""
    departed: float
    """When."""


@dataclass
class _Asking:
    """A request to several clients, and whose answer is awaited."""

    phase: str
    message_type: str
    request: Callable[[str], Body]
    fold: Fold
    may_miss: bool
    waiting: dict[str, _Waiting] = field(default_factory=dict)
    """By message id."""

    @property
    def expected(self) -> str:
        """What an answer's manifest must call its content."""
        return self.message_type.rpartition(".")[2]


def _peaks(body: Body) -> dict[str, int]:
    """Peak memory that a client reports, in bytes."""
    reported = Process.from_body(body).peak_memory
    peak = {who: int(count) for who, count in reported.items()}
    return {"client": peak.get("resident", 0), "client_gpu": peak.get("gpu", 0)}


def _received(reply: Message) -> int:
    content = reply.content if reply.has_content() else RecordDict()
    return size_of(content)
