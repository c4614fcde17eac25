r"""IEL: rounds in which clients train inside the sum of all, each its own task vector.

.. math:: \theta_P = \theta_0 + \lambda \Big(\sum_{s \ne c} w_s \tau_s + w_c \tau_c\Big)

is the model that client c trains; only its own :math:`\tau_c` changes (Porrello et al., ICLR 2025,
arXiv 2405.16350, Eq. 17 to 19). The client is sent the sum over the others, its share and the mean
Fisher, so a message does not grow with the number of clients. Nor does the server's memory: it
keeps the sum, and reads task vectors from disk.

A client may miss a round (its last task vector stays), join in a later one, or leave after one (its
task vector is taken out of the sum, exactly); see :mod:`server.rounds.attendance`. In the end the
last task vector of each client is composed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from torch import Tensor

from fedcompo.data.tasks import one_of_each
from fedcompo.errors import ContributionError, TooFewClients
from fedcompo.messages.answers import LacksAnswer, TrainAnswer, read_trained
from fedcompo.messages.body import Body
from fedcompo.messages.requests import ANCHOR, OWN, Others, Round, TrainRequest
from fedcompo.registry.admission import outliers
from fedcompo.registry.registry import Registry
from server.exchange.exchange import Exchange
from server.phases.fitting import Fitting
from server.phases.roster import Roster
from server.resume import Working
from server.rounds.attendance import Attendance
from server.rounds.current_sum import CurrentSum
from server.rounds.holdings import Holdings, LastSent


@dataclass
class Rounds:
    """Lets clients train in rounds; a :class:`Fitting` describes them and checks their answers."""

    fitting: Fitting
    number: int
    """How many rounds."""
    last: LastSent
    """The clients' last task vectors."""
    continuing: bool = False
    """Whether members of the registry go on from what they are there."""
    working: Working | None = None
    """Where finished rounds are noted, so that the run can be resumed; None: it cannot."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """By round: who is in the sum, trained, missed it, came or went; and the mean loss."""

    def __post_init__(self) -> None:
        """Set up what is kept from round to round."""
        self.exchange: Exchange = self.fitting.exchange
        self.registry: Registry = self.fitting.registry
        self.roster: Roster = self.fitting.roster
        closed = self.roster.newcomers if self.continuing else None
        past = list(self.working.steps) if self.working else []
        self.attendance = Attendance(self.fitting, self.number, closed, past)
        self.sum = CurrentSum(self.fitting, self.last)
        self.holdings = Holdings()

    # -- who is there -----------------------------------------------------------------------------

    def run(self) -> None:
        """Do all rounds; raises ``TooFewClients`` if there is a round in which nobody trains."""
        going_on = self.roster.newcomers if self.continuing else ()
        self.sum.begin(self.roster.participants.members, going_on)
        for number in range(1, self.number + 1):
            with self.exchange.books.during(f"round {number}"):
                came = self.attendance.welcome(number)
                if came:
                    self.holdings.change_anchors()
                happened = self.round(number)
                went = self.attendance.leaving(number)
                self.part_with(went, number)
            self.history.append({**happened, "came": list(came), "went": list(went)})
            if self.working and number > len(self.working.steps):
                self.working.step(self.history[-1])
        self.drop_outliers()
        self.drop_silent()
        self.attendance.close()

    def part_with(self, clients: Collection[str], number: int) -> None:
        """After a round, take clients out of the sum, the Fisher, the joint head, and the run."""
        for client in clients:
            self.sum.drop(client)
            if client in self.exchange.clients:
                reason = f"left after round {number}; its task vector is out of the sum"
                self.exchange.leave_out("train", client, reason)
        if clients:
            self.fitting.forget(clients)
            self.holdings.change_anchors()
            if self.roster.parties and number < self.number:
                self.fitting.align()

    def drop_outliers(self) -> None:
        """Take out whose last task vector stands out among those that are there in the end."""
        while long := outliers(self.sum.trained, self.fitting.company()):
            for client in long:
                self.sum.drop(client)
            self.fitting.leave_out("train", long)

    def drop_silent(self) -> None:
        """Leave out clients that never sent a task vector; raises ``TooFewClients``."""
        there = self.roster.parties
        if silent := sorted(set(there) - set(self.sum.clients)):
            self.fitting.forget(silent)
        for client in set(silent) & set(self.exchange.clients):
            self.exchange.leave_out("train", client, "sent no task vector in any round")
        self.exchange.require_clients("train", self.sum.trained)

    # -- one round --------------------------------------------------------------------------------

    def round(self, number: int) -> dict[str, Any]:
        """Let all connected clients train inside the sum of the round's beginning.

        Returns:
            What happened, as JSON values.
        """
        asked = self.attendance.asked(number)
        if not asked:
            self.exchange.require_clients("train", asked)
            raise TooFewClients(f"Nobody is there to train in round {number}.")
        self._number, self._together = number, self.sum.together(asked)
        self._arrived: dict[str, dict[str, Any]] = {}
        self._lacking: set[str] = set()
        self._before = dict(self.fitting.admitted)
        missed = self._book_missed()
        self._ask(asked)
        if self._lacking:
            self._ask(self._lacking)
        while long := outliers(self._arrived, self.fitting.company()):
            for client, reason in long.items():
                self._refuse(client, reason)
        inside, losses = set(self.sum.clients), {}
        for client, figures in sorted(self._arrived.items()):
            try:
                self.sum.put(client, inside)
            except ContributionError as error:  # its values are too large to be summed
                self._refuse(client, str(error))
                continue
            self.fitting.note_figures(client, figures)
            losses[client] = figures["losses"][-1]
        if not losses:
            books = self.exchange.books
            this = [missed for missed in books.missed if missed.phase == books.label("train")]
            reasons = [f"  - {missed.client}: {missed.reason}" for missed in this]
            raise TooFewClients("\n".join([f"Nobody trained in round {number}:", *reasons]))
        return {
            "round": number,
            "members": list(self.sum.clients),
            "trained": sorted(losses),
            "missed": sorted({*asked, *missed} - set(losses)),
            "mean_loss": fmean(losses.values()),
        }

    def _book_missed(self) -> tuple[str, ...]:
        """Book those who take part, but cannot be asked in this round; returns their names."""
        missed, absent = self.attendance.missed(self._number), self.roster.participants.absent
        reasons = dict.fromkeys(missed, "it missed this round before the run was interrupted")
        reasons |= dict.fromkeys(sorted(absent - set(missed)), "its node is not connected")
        for client, reason in reasons.items():
            self.exchange.books.miss("train", client, reason)
        return tuple(reasons)

    def _ask(self, clients: Iterable[str]) -> None:
        """Ask clients to train inside the sum of the round's beginning.

        What arrives waits, on disk, for the round's end. A client that has lost what it kept from
        the round before is entered in ``_lacking``; asked again, it is sent all that it needs.
        """
        self.exchange.ask(
            "train",
            "train",
            self._request,
            self._fold,
            may_miss=True,
            decisive=False,
            clients=clients,
        )

    def _fold(self, client: str, body: Body) -> str:
        answer = read_trained(body)
        if not isinstance(answer, LacksAnswer):
            self._check(client, answer)
            return client
        lacks = " and ".join(answer.lacks)
        if client in self._lacking:
            raise ContributionError(f"It lacks {lacks}, but was sent all that it needs.")
        self._lacking.add(client)
        self.holdings.lost(client)
        self.exchange.books.note(f"{client} has lost what it kept ({lacks}); it is sent again.")
        return client

    def _request(self, client: str) -> Body:
        """Request for a client: the sum over the others, and what else it needs but lacks."""
        fitting, together = self.fitting, self._together
        sent, needs = self.holdings.request(client, self._needed(client), self._wanted)
        return TrainRequest(
            joint=fitting.aligned,
            kind=self.roster.participants.kinds[client],
            frozen="losses" not in fitting.figures.get(client, {})
            and client in one_of_each(self.roster.present),
            needs=needs,
            sent=sent,
            others=Others(
                rest=self.sum.running.rest(client, together=together),
                share=self.sum.times(client) / together,
                scale=self.registry.settings.scale or 1.0,
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
        """Names of what a client trains with and may have kept from the round before."""
        anchored = [ANCHOR] if self.fitting.fishers.anchored(client) else []
        return [*anchored, OWN] if client in self.sum.clients else anchored

    def _wanted(self, client: str, name: str) -> dict[str, Tensor]:
        """The server's copy of what a client needs."""
        if name == ANCHOR:
            return self.fitting.fishers.anchor_of(client)
        return self.sum.own(client)

    def _check(self, client: str, answer: TrainAnswer) -> None:
        """Check a client's answer, and write it beside the one of its last round."""
        made, figures = self.fitting.check_trained(client, answer)
        digest = self.last.arrive(client, made.task_vector, answer.own)
        self.holdings.sent(client, digest, answer.holds)
        self._arrived[client] = figures

    def _refuse(self, client: str, reason: str) -> None:
        """Reject what a client sent in this round; its last task vector stays."""
        self.last.refuse(client)
        self.holdings.lost(client)
        self._arrived.pop(client, None)
        self.fitting.admitted.pop(client, None)
        self.fitting.admitted |= {c: known for c, known in self._before.items() if c == client}
        self.exchange.books.miss("train", client, reason)
