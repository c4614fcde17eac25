"""Remove a client from a registry; tell those who stay, and measure the model before and after.

identify → evaluate → remove → notify → realign → vote → evaluate. The registry does the removal,
and needs no client for it. The other phases use the clients that are connected; the removal waits
for none of them, because a client has the right to leave. Of a client with several tasks
(:mod:`fedcompo.data.tasks`) all members are removed, each with a record of its own.

With ``repair-rounds`` those who stay then train on inside their sum (:mod:`server.rounds.rounds`),
without the client. They continue from their task vectors: what these learnt from the client is not
undone, and their lineage still names it.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedcompo.backbone.backbone import Backbone
from fedcompo.config.choices import Kind, Method
from fedcompo.config.run import RunConfig
from fedcompo.config.server import RegistryConfig
from fedcompo.data.tasks import members_of
from fedcompo.errors import ContributionError, FedcompoError
from fedcompo.messages.answers import IdentifyAnswer
from fedcompo.messages.body import Body
from fedcompo.messages.requests import NoticeRequest
from fedcompo.names import require_known
from fedcompo.registry.company import Company
from fedcompo.registry.registry import Registry
from fedcompo.registry.removal import RemovalRecord
from server.exchange.exchange import Exchange
from server.phases import choosing, fitting
from server.phases.choosing import Choosing
from server.phases.composing import Composing
from server.phases.fitting import Fitting
from server.phases.roster import Roster
from server.rounds.holdings import ROUNDS, LastSent
from server.rounds.rounds import Rounds

PHASES = ("identify", "evaluate before", "remove", "notify")


def phases_of(config: RunConfig) -> tuple[str, ...]:
    """All phases of a removal."""
    repair = (*fitting.phases_of(config), "compose") if config.registry.repair_rounds else ()
    return (*PHASES, *repair, *choosing.phases_of(config), "evaluate")


@dataclass
class Unlearning:
    """One removal."""

    exchange: Exchange
    config: RunConfig
    backbone: Backbone
    registry: Registry
    output: Path
    """Folder of the run, for temporary files."""
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    """Accuracies before the removal, by client; measured by those who stay."""
    after: dict[str, dict[str, float]] = field(default_factory=dict)
    """Accuracies at the end, after the removal and the repair."""
    rounds: list[dict[str, Any]] = field(default_factory=list)
    """The history of the rounds of repair; see :class:`server.rounds.rounds.Rounds`."""

    def __post_init__(self) -> None:
        """Raise, before any client is asked, if the client is not in the registry."""
        self.going = members_of(self.request.client, self.registry.clients)
        require_known(self.going or [self.request.client], self.registry.clients, "registry")
        if self.request.repair_rounds:
            self.registry.settings.check_method(Method.IEL)
        others = partial(Company.of, self.registry, self.backbone)
        self.roster = Roster(self.exchange, self.backbone, others)
        self.choosing = Choosing(self.roster, self.registry, self.config)

    @property
    def request(self) -> RegistryConfig:
        """The client to remove, and who requested it."""
        return self.config.registry

    def run(self) -> None:
        """Do all phases; afterwards :meth:`results` says what happened."""
        self.identify()
        self.before = self.evaluate("evaluate before")
        self.exchange.books.timed("remove", self.remove)
        self.notify()
        if self.request.repair_rounds and self.exchange.clients:
            self.repair()
        if self.config.compose.realign and self.registry.clients:
            self.choosing.run()
        self.after = self.evaluate("evaluate")

    def identify(self) -> None:
        """Learn who is connected; only members that stay take part in the other phases."""
        self.roster.identify(accept=self._accept)
        missing = sorted(set(self.registry.clients) - {*self.exchange.clients, *self.going})
        if missing:
            self.exchange.books.note(
                f"Not connected, so neither asked nor told: {', '.join(missing)}. "
                "The removal does not wait for them."
            )

    def _accept(self, name: str, answer: IdentifyAnswer) -> None:
        if name in self.going:
            raise ContributionError("This is the client to be removed; it is not asked again.")
        if name not in self.registry.clients and members_of(name, self.registry.clients):
            raise ContributionError("The registry has shards of it. Set `shards` to their number.")
        known = self.registry.member(name).classes
        if answer.classes != known:
            raise ContributionError(
                f"Client {name!r} has the classes {list(answer.classes)} now; in the registry it "
                f"has {list(known)}."
            )

    def evaluate(self, phase: str) -> dict[str, dict[str, float]]:
        """Let those who stay measure the current model; returns their figures, by client."""
        if not self.exchange.clients or not self.registry.clients:
            return {}
        composing = Composing(self.exchange, self.backbone, self.registry)
        composing.evaluate(phase, decisive=False, last=phase == "evaluate")
        tests = self.roster.participants.tests
        return {c: {**own, "num_examples": tests[c]} for c, own in composing.figures.items()}

    def remove(self) -> None:
        """Remove the client, or all its members, from the registry."""
        self.records: list[RemovalRecord] = [
            self.registry.remove(
                member,
                requested_by=self.request.requested_by,
                reason=self.request.reason,
                keep_versions=self.request.keep_versions,
            )
            for member in self.going
        ]

    @property
    def retrain(self) -> list[str]:
        """Those who stay and learnt from the client."""
        learnt = {name for record in self.records for name in record.influence.to_retrain}
        return sorted(learnt - {*self.going})

    def notify(self) -> None:
        """Tell those who stay of the removal, and which of them learnt from the client."""
        left, records = ", ".join(self.going), "".join(record.text for record in self.records)

        def request(client: str) -> Body:
            text = f"{left} left; the model holds nothing of its task vector any more."
            if client in self.retrain:
                text += " This client was trained with something of it; train again to undo that."
            return NoticeRequest(text=text, record=records).to_body()

        if self.exchange.clients:
            self.exchange.ask(
                "notify", "query.notice", request, lambda client, body: client, decisive=False
            )

    def repair(self) -> None:
        """Let connected clients train on inside the sum of all who stay.

        If that fails, the removal stands, and their contributions stay as they were.
        """
        try:
            self._repair()
        except (FedcompoError, OSError) as error:
            self.exchange.books.note(f"The repair failed, the removal stands: {error}")

    def _repair(self) -> None:
        going_on, members = self.exchange.clients, self.registry.state.members
        participants = replace(
            self.roster.participants,
            members=tuple(client for client in members if client not in going_on),
            kinds={client: Kind(members[client].kind) for client in going_on},
        )
        roster = Roster(self.exchange, self.backbone, self.roster.others, participants)
        folder = self.output / fitting.INCOMING
        fits = Fitting(roster, self.config, self.registry, folder, ensembled=True)
        last = LastSent(self.output / ROUNDS)
        rounds = Rounds(fits, self.request.repair_rounds, last, continuing=True)
        try:
            rounds.run()
            folders = rounds.sum.keep()
            self.exchange.books.timed(
                "compose", lambda: self.registry.add(*folders, replacing=True, empty=True)
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            last.clear()
        self.rounds = rounds.history

    def results(self) -> dict[str, Any]:
        """What happened, as JSON values."""
        first, last = self.records[0], self.records[-1]
        places = [str(self.registry.path / record.place) for record in self.records]
        return {
            "removed": self.request.client,
            "record": places[-1],
            "records": places,
            "root_before": first.root_before,
            "root_after": last.root_after,
            "root": self.registry.state.root,
            "survivors": list(last.survivors),
            "influence_exact": not self.retrain,
            "to_retrain": self.retrain,
            "rounds": self.rounds,
            "joint_head": "realigned" if self.registry.realigned else "aligned",
            "scale": self.choosing.report() if self.registry.clients else None,
            "accuracy_before": self.before,
            "accuracy_after": self.after,
        }
