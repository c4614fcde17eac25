"""Send a request to each client, and handle the answers one at a time.

Clients go by their names, not by Flower's node ids. A client that raises, sends an answer that
fails its checks, or does not answer in time is left out of the rest of the run. Where a phase may
be missed (one round of many), it misses that phase alone. Either way the books name it, with the
reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from logging import INFO
from typing import Any

from flwr.app import Message
from flwr.common.logger import log

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.data.tasks import whole_of
from fedcompo.errors import FedcompoError, TooFewClients
from fedcompo.messages.answers import Process
from fedcompo.messages.body import Body
from fedcompo.messages.records import from_record, size_of, to_record
from fedcompo.messages.requests import addressed
from fedcompo.names import LONGEST
from server.exchange.books import NOTHING, Books, Traffic
from server.exchange.checks import checked_caps, figures_of
from server.exchange.kept_answers import KeptAnswers, question
from server.exchange.nodes import Nodes

Fold = Callable[[str, Body], str]
"""Takes a client's name and answer, checks the answer, *then* keeps what is needed of it. Returns
the client's name from now on. Raises to refuse the answer, and has kept nothing then."""
NAMING = ("describe", "identify")
"""Phases in which clients first say their names."""
POLL = 0.01, 2.0
"""Seconds between two looks for answers: at first, and at most."""
SLOWER = 1.05
"""Growth of that pause from one look to the next: it is a twentieth of the time waited so far."""


@dataclass
class Exchange:
    """The conversation with the clients of a run. What it costs is entered in the books."""

    books: Books
    nodes: Nodes
    timeout: float
    """Seconds that a client has to connect, and to answer a request for each of its shards."""
    min_clients: int
    """Clients without which the run fails."""
    in_flight: int = 0
    """Requests under way at a time, which bounds the answers in memory; 0: all at once."""
    answers: KeptAnswers | None = None
    """Where answers are kept, if an interrupted run can be resumed; None: it cannot."""
    preprocessing: Preprocessing | None = None
    """How clients prepare their examples; None: as their own backbones say."""

    @property
    def clients(self) -> tuple[str, ...]:
        """Names of the clients still in the run, sorted."""
        return self.nodes.clients

    @property
    def limit(self) -> float:
        """Seconds that an answer may take: a node answers for its shards one after the other."""
        return self.timeout * self.nodes.shards

    def gather(self, wanted: int) -> None:
        """Wait for so many clients to connect; see :meth:`Nodes.gather`.

        Raises:
            TooFewClients: If fewer than ``min_clients`` come in time.
        """
        came = self.nodes.gather(wanted, least=self.min_clients, timeout=self.timeout)
        if came < wanted:
            self.books.note(f"{came} of {wanted} client(s) connected within {self.timeout:g} s.")

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
        """Send clients a request, and fold in their answers one at a time.

        Args:
            phase: Name of the phase, for people.
            message_type: Flower's, such as ``query.describe``.
            request: Makes the tensors and manifest for a client, by its name.
            fold: Checks and keeps each answer.
            decisive: Fail if fewer than ``min_clients`` remain.
            may_miss: A client whose answer cannot be used misses this phase alone.
            clients: Whom to ask; None: everyone still in the run.

        Raises:
            TooFewClients: If it is decisive and too few clients remain.
        """
        books, label = self.books, self.books.label(phase)
        asked = self.clients if clients is None else tuple(sorted(clients))
        started = books.begin(phase, () if phase in NAMING else asked)
        costs = books.traffic.setdefault(label, {})
        asking = _Asking(phase, message_type, request, fold, may_miss)
        for client in asked:
            while self.in_flight and len(asking.waiting) >= self.in_flight:
                self._collect(asking, most=self.in_flight - 1)
            self._send(client, asking)
        self._collect(asking, most=0)
        books.end(phase, started)
        log(INFO, "%s: %d client(s), %.1f s", label, len(costs), books.seconds[label])
        if decisive:
            self.require_clients(phase)

    def require_clients(self, phase: str, usable: Collection[str] | None = None) -> None:
        """Raise ``TooFewClients``, with all who could not be used, if too few remain after a phase.

        A client counts once, whatever the number of its shards. Usable are, unless they are named,
        all that are still in the run.
        """
        count = len({whole_of(c) for c in (self.clients if usable is None else usable)})
        if count >= self.min_clients:
            return
        missed = [m for m in self.books.missed if m.phase.partition(",")[0] == phase]
        without = (*self.books.left_out, *missed)
        reasons = [f"  - {client.client} ({client.phase}): {client.reason}" for client in without]
        raise TooFewClients(
            f"{count} usable client(s) after the phase {phase!r}, `min-clients` is "
            f"{self.min_clients}. Left out:\n" + ("\n".join(reasons) or "  nobody")
        )

    def _send(self, client: str, asking: _Asking) -> None:
        """Send a client its request, unless its answer was kept."""
        request = asking.request(client)
        asked = "" if self.answers is None else question(request)
        if self._recalled(client, asking, asked):
            return
        name, shard = self.nodes.node_name(client), self.nodes.shard(client)
        content = to_record(*addressed(request, name, self.preprocessing, shard))
        node = self.nodes.ids[client]
        message = Message(content, node, asking.message_type, ttl=self.limit)
        departed, sent = time.monotonic(), size_of(content)
        ids = list(self.nodes.grid.push_messages([message]))
        if ids and ids[0]:
            asking.waiting[ids[0]] = _Waiting(client, asked, sent, departed)
        else:
            self._fail(asking, client, "its node is gone", Traffic(sent, 0, 0.0))

    def _recalled(self, client: str, asking: _Asking, asked: str) -> bool:
        """Fold in an answer that was kept before an interruption; returns whether there was one."""
        kept = self.answers and self.answers.recall(self.books.label(asking.phase), client, asked)
        if not kept:
            return False
        body, cost = kept
        try:
            name = asking.fold(client, body)
        except OSError:  # this server's disk, as in `_take`
            raise
        except Exception as error:  # another version may have kept it
            kind = type(error).__name__
            log(INFO, "%s is asked again: its kept answer does not serve (%s)", client, kind)
            return False
        self._book(asking, client, name, body, cost, reason="answered before the interruption")
        return True

    def _collect(self, asking: _Asking, *, most: int) -> None:
        """Take answers as they come, until at most so many requests are under way.

        The time limit of an answer runs from the departure of its own request.
        """
        pause, waiting = POLL[0], asking.waiting
        while len(waiting) > most:
            answered = False
            for message_id in list(waiting):
                for reply in self.nodes.grid.pull_messages([message_id]):
                    self._take(asking, waiting.pop(message_id), reply)
                    answered = True
            self._give_up(asking)
            pause = POLL[0] if answered else min(SLOWER * pause, POLL[1])
            if len(waiting) > most:
                time.sleep(pause)

    def _give_up(self, asking: _Asking) -> None:
        """Stop waiting for answers whose time is over."""
        for message_id, awaited in list(asking.waiting.items()):
            seconds = time.monotonic() - awaited.departed
            if seconds >= self.limit:
                del asking.waiting[message_id]
                reason = f"no answer within {self.limit:g} s"
                self._fail(asking, awaited.client, reason, Traffic(awaited.sent, 0, seconds))

    def _take(self, asking: _Asking, awaited: _Waiting, reply: Message) -> None:
        """Fold one reply in, or go on without its client."""
        client, seconds = awaited.client, time.monotonic() - awaited.departed
        received = size_of(reply.content) if reply.has_content() else 0
        cost = Traffic(awaited.sent, received, seconds)
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
            self._fail(asking, client, str(error), cost, getattr(error, "client", ""))
            return
        except OSError:  # what fails is this server's disk: no fault of the client's
            raise
        except Exception as error:  # whatever a strange answer can provoke
            reason = f"its answer is malformed ({type(error).__name__}: {error})"
            self._fail(asking, client, reason, cost)
            return
        if self.answers is not None:
            self.answers.keep(self.books.label(asking.phase), name, awaited.asked, body, cost)
        self._book(asking, client, name, body, cost)

    def _book(
        self, asking: _Asking, client: str, name: str, body: Body, cost: Traffic, reason: str = ""
    ) -> None:
        """Enter an answer that was folded in."""
        if name != client:
            self.nodes.rename(client, name)
        known: dict[str, Any] = {"peaks": _peaks(body), "caps": checked_caps(name, body)}
        known["figures"] = figures_of(body) if asking.expected in ("train", "evaluate") else {}
        self.books.answered(asking.phase, name, cost, **known, reason=reason)

    def _fail(
        self, asking: _Asking, client: str, reason: str, cost: Traffic, claimed: str = ""
    ) -> None:
        """Go on without a client: in this phase, or in all that follow.

        One that fails before it is known by name goes by the name it is registered under, or else
        claims in its refusal.
        """
        if asking.may_miss:
            self.books.miss(asking.phase, client, reason, cost)
            return
        name = self.nodes.registered_name(client) or claimed
        shown = 0 < len(name) <= LONGEST and name.isprintable() and name not in self.clients
        self.nodes.drop(client)
        called = name if shown and asking.phase in NAMING else client
        self.books.leave_out(asking.phase, called, reason, cost)

    def leave_out(self, phase: str, client: str, reason: str, cost: Traffic = NOTHING) -> None:
        """Take a client out of the rest of the run; the books say why."""
        self.nodes.drop(client)
        self.books.leave_out(phase, client, reason, cost)


@dataclass(frozen=True)
class _Waiting:
    """A request to one client that is not answered yet."""

    client: str
    asked: str
    """SHA-256 of the request; see :func:`server.exchange.kept_answers.question`."""
    sent: int
    """Bytes."""
    departed: float
    """Time of departure, by the monotonic clock."""


@dataclass
class _Asking:
    """A request to several clients, and those that have not answered yet."""

    phase: str
    message_type: str
    request: Callable[[str], Body]
    fold: Fold
    may_miss: bool
    waiting: dict[str, _Waiting] = field(default_factory=dict)
    """By message id."""

    @property
    def expected(self) -> str:
        """The ``content`` that an answer's manifest must have."""
        return self.message_type.rpartition(".")[2]


def _peaks(body: Body) -> dict[str, int]:
    """Peak memory that a client reports, in bytes, by process and GPU."""
    peak = Process.from_body(body).peak_memory
    return {"client": peak.get("resident", 0), "client_gpu": peak.get("gpu", 0)}
