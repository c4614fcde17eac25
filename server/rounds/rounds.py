r"""IEL: rounds in which clients train inside the sum of all, each its own task vector.

.. math:: \theta_P = \theta_0 + \lambda \Big(\sum_{s \ne c} w_s \tau_s + w_c \tau_c\Big)

is what client c trains, with only its own :math:`\tau_c` changing (Porrello et al., ICLR 2025,
arXiv 2405.16350, Eq. 17 to 19). It is sent the sum over the others, its share and the mean Fisher:
a message does not grow with the number of clients, nor does the memory of the server, which keeps
the sum and reads task vectors from disk.

A client may miss a round (its last task vector stays), join in a later one, or leave between two
(its task vector is taken out of the sum, exactly); see :mod:`server.rounds.attendance`. What it
sent last is what is composed in the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from fedcompo.composition.running_sum import RunningSum
from fedcompo.errors import ContributionError, TooFewClients
from fedcompo.messages.answers import LacksAnswer, TrainAnswer, read_trained
from fedcompo.messages.body import Body
from fedcompo.messages.requests import ANCHOR, OWN, Others, Round, TrainRequest, own_tensors
from fedcompo.method.heads import Head
from fedcompo.method.task_vector import TaskVector
from fedcompo.registry.registry import Registry
from server.exchange.checks import too_long
from server.exchange.exchange import Exchange
from server.phases.fitting import Fitting
from server.resume import Working
from server.rounds.attendance import Attendance
from server.rounds.holdings import Holdings, LastSent
from server.traces import Trace


@dataclass
class Rounds:
    """Lets clients train in rounds, from what a :class:`Fitting` knows of them."""

    fitting: Fitting
    number: int
    """How many rounds."""
    last: LastSent
    """The clients' last task vectors."""
    continuing: bool = False
    """Whether members of the registry go on from what they are there."""
    working: Working | None = None
    """Where rounds that are over are noted, for a run that is interrupted; None: nowhere."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """By round: who is in the sum, trained, or missed it; the mean loss; who came, or went then."""

    def __post_init__(self) -> None:
        """Begin with the sum of the registry's members."""
        self.exchange: Exchange = self.fitting.exchange
        self.registry: Registry = self.fitting.registry
        closed = self.fitting.newcomers if self.continuing else None
        past = list(self.working.steps) if self.working else []
        self.attendance = Attendance(self.fitting, self.number, closed, past)
        self.heads: dict[str, Head] = {}
        self.traces: dict[str, Trace] = {}
        self._entered: set[str] = set()
        self.holdings = Holdings()

    # -- who is there -----------------------------------------------------------------------------

    def seat_members(self) -> None:
        """Put the registry's members into the sum: as they are, or to go on from there."""
        theta_0, settings = self.fitting.backbone.theta_0, self.registry.settings
        vectors, times = {}, {}
        going_on = self.fitting.newcomers if self.continuing else ()
        for client in (*self.fitting.members, *going_on):
            contribution = self.registry.contribution(client)
            vectors[client] = contribution.task_vector
            times[client] = settings.times(contribution.num_examples)
            if client not in self.fitting.members:
                self.heads[client] = contribution.head
                self.fitting.kinds[client] = contribution.task_vector.kind
                self.traces.setdefault(client, Trace()).see(contribution.lineage)
        self.sum = RunningSum.of(theta_0, vectors, times)

    def run(self) -> None:
        """Do all rounds; raises ``TooFewClients`` if one of them has nobody left to train."""
        self.seat_members()
        for number in range(1, self.number + 1):
            self.exchange.part = f"round {number}"
            came = self.attendance.welcome(number)
            if came:
                self.holdings.change_anchors()
            happened = self.round(number)
            went = self.attendance.leaving(number)
            self.part_with(went, number)
            self.history.append({**happened, "came": list(came), "went": list(went)})
            if self.working and number > len(self.working.steps):
                self.working.step(self.history[-1])
        self.exchange.part = ""
        self.drop_silent()
        self.attendance.close()

    def part_with(self, clients: Iterable[str], number: int) -> None:
        """Take clients out: of the sum, of the metric, of the joint head, of all that follows.

        Args:
            clients: Who leaves.
            number: Of the round that is over.
        """
        for client in clients:
            if client in self.sum.clients:
                self.sum.drop(client)
                self.last.forget(client)
                self._entered.discard(client)
            if client in self.exchange.clients:
                reason = f"left after round {number}; its task vector is out of the sum"
                self.exchange.leave_out("train", client, reason)
        if clients:
            self.fitting.forget(clients)
            self.holdings.change_anchors()
            if self.fitting.parties and number < self.number:
                self.fitting.align()

    def drop_silent(self) -> None:
        """Leave out who never sent a task vector; raises ``TooFewClients``."""
        there = {*self.attendance.present, *self.fitting.absent}
        if silent := sorted(there - set(self.sum.clients)):
            self.fitting.forget(silent)
        for client in set(silent) & set(self.exchange.clients):
            self.exchange.leave_out("train", client, "sent no task vector in any round")
        self.exchange.require_clients("train", self.trained)

    # -- one round --------------------------------------------------------------------------------

    def round(self, number: int) -> dict[str, Any]:
        """Let everyone who is there train, inside the sum as it is at the beginning.

        Returns:
            What happened, as JSON values.
        """
        asked, absent = self.attendance.asked(number), self.fitting.absent
        if not asked:
            self.exchange.require_clients("train", asked)
            raise TooFewClients(f"Nobody is there to train in round {number}.")
        self._number, self._together = number, self._count(asked)
        self._arrived: dict[str, dict[str, Any]] = {}
        missed = self.attendance.missed(number)
        for client in missed:
            reason = "it missed this round before the run was interrupted"
            self.exchange.miss("train", client, reason)
        for client in sorted(absent - set(missed)):
            self.exchange.miss("train", client, "its node is not connected")
        if lacking := self._ask(asked):  # who lost what it was left to remember is sent all of it
            self._ask(lacking, again=True)
        norms = {client: figures["norm"] for client, figures in self._arrived.items()}
        for client, reason in too_long(norms, self.fitting.config.server.max_norm_ratio).items():
            self._refuse(client, reason)
        inside, losses = set(self.sum.clients), {}
        for client, figures in sorted(self._arrived.items()):
            if self._enter(client, inside):
                self.fitting.note_figures(client, figures)
                losses[client] = figures["losses"][-1]
        if not losses:
            label = self.exchange.label("train")
            reasons = [
                f"  - {m.client}: {m.reason}" for m in self.exchange.missed if m.phase == label
            ]
            raise TooFewClients("\n".join([f"Nobody trained in round {number}:", *reasons]))
        return {
            "round": number,
            "members": list(self.sum.clients),
            "trained": sorted(losses),
            "missed": sorted({*asked, *absent, *missed} - set(losses)),
            "mean_loss": fmean(losses.values()),
        }

    def _ask(self, clients: tuple[str, ...], *, again: bool = False) -> tuple[str, ...]:
        """Ask clients to train; returns who cannot without being sent more.

        All see the sum of the round's beginning. What arrives waits, on disk, for the round's end.

        Args:
            clients: Whom to ask.
            again: Whether they are sent all that they need, and cannot lack anything.
        """
        lacking: list[str] = []

        def fold(client: str, body: Body) -> str:
            answer = read_trained(body)
            if isinstance(answer, LacksAnswer):
                names = " and ".join(answer.lacks)
                if again:
                    raise ContributionError(f"It lacks {names}, but was sent all that it needs.")
                self.holdings.lost(client)
                lacking.append(client)
                self.exchange.note(f"{client} has lost what it kept ({names}); it is sent again.")
            else:
                self._check(client, answer)
            return client

        self.exchange.ask(
            "train", "train", self._request, fold, may_miss=True, decisive=False, clients=clients
        )
        return tuple(sorted(lacking))

    def _count(self, asked: Iterable[str]) -> int:
        """M: how often all count who are in the sum, or are about to be."""
        return sum((self.sum.times | {client: self._times(client) for client in asked}).values())

    def _times(self, client: str) -> int:
        described = self.fitting.roster.described[client]
        return self.registry.settings.times(described.num_examples)

    def _request(self, client: str) -> Body:
        """The sum over the others, and what the client needs besides and does not hold."""
        fitting, together = self.fitting, self._together
        sent, needs = self.holdings.request(client, self._needed(client), self._wanted)
        return TrainRequest(
            joint=fitting.aligned,
            kind=fitting.kinds[client],
            frozen="losses" not in fitting.figures.get(client, {}),
            needs=needs,
            sent=sent,
            others=Others(
                rest=self.sum.rest(client, together=together),
                share=self._times(client) / together,
                scale=self.registry.settings.scale,
            ),
            round=Round(
                number=self._number,
                federation=self.registry.identity,
                last=self._number == self.number,
                passed=(self._number - 1) / self.number,
                share=1 / self.number,
            ),
        ).to_body()

    def _needed(self, client: str) -> list[str]:
        """What a client trains with that it may have kept from the round before."""
        anchored = [ANCHOR] if self.fitting.anchors.anchored(client, with_own=True) else []
        return [*anchored, OWN] if client in self.sum.clients else anchored

    def _wanted(self, client: str, name: str) -> dict[str, Tensor]:
        """The server's copy of it."""
        if name == ANCHOR:
            return self.fitting.anchor_of(client)
        own = self.sum.vectors[client].tensors
        return own_tensors({n: own[n] for n in own}, self.heads[client])

    def _check(self, client: str, answer: TrainAnswer) -> None:
        """Check what a client trained, and put it beside what it trained the last time."""
        vector, _, figures = self.fitting.check_trained(client, answer)
        digest = self.last.arrive(client, vector, answer.own)
        self.holdings.sent(client, digest, answer.holds)
        self._arrived[client] = figures

    def _enter(self, client: str, inside: set[str]) -> bool:
        """Let what a client sent take the place of what it sent before, in the sum and on disk.

        Args:
            client: Who trained.
            inside: Whose task vectors were in the sum that it trained in.

        Returns:
            Whether it could be summed. If not, the client misses the round, and goes on from what
            it sent before.
        """
        vector, _ = self._read(client, arriving=True)
        try:
            self.sum.put(client, vector, times=self._times(client))
        except ContributionError as error:
            self._refuse(client, str(error))
            return False
        self.last.take(client)
        self.sum.vectors[client], self.heads[client] = self._read(client)
        self._entered.add(client)
        trace = self.traces.setdefault(client, Trace())
        trace.see(self.fitting.lineage(client), inside - {client})
        return True

    def _refuse(self, client: str, reason: str) -> None:
        """Do without what a client sent in this round; it goes on from what it sent before."""
        self.last.refuse(client)
        self.holdings.lost(client)
        self._arrived.pop(client, None)
        self.exchange.miss("train", client, reason)

    def _read(self, client: str, *, arriving: bool = False) -> tuple[TaskVector, Head]:
        fitting = self.fitting
        kind, base = fitting.kinds[client], fitting.backbone.fingerprint
        classes = fitting.roster.described[client].classes
        return self.last.read(client, kind, base, classes, arriving=arriving)

    # -- what comes of it -------------------------------------------------------------------------

    @property
    def trained(self) -> tuple[str, ...]:
        """Clients that trained in this run and are in the sum, sorted."""
        return tuple(sorted(self._entered))

    def keep(self) -> list[Path]:
        """Write the contributions of all who trained; returns their folders."""
        folders = []
        for client in self.trained:
            lineage = self.traces[client].lineage
            self.fitting.keep(client, self.sum.vectors[client], self.heads[client], lineage)
            folders.append(self.fitting.folder(client))
        return folders
