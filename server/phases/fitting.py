"""The first half of a run: each client describes itself and fits its task vector.

Describe → train. A client's description holds the statistics of its features and the Fisher
diagonal of these. Between the two the server makes the joint head of all statistics; the Fisher of
class probabilities under it, if it is wanted, has a phase of its own. Under ITA each client trains
alone, under IEL inside the sum of the registry's members; rounds are in :mod:`server.rounds`.

If the others' Fisher anchors a client (the default), or if it trains under the joint head, its
result depends on the others, and its lineage names them. If it starts from zero or its own probe,
and is anchored by its own Fisher of features or by a reference, its result has the same bits
whoever else takes part, and its lineage is empty. A client with a single class has no such way: it
trains under the joint head.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedcompo.backbone.backbone import Backbone
from fedcompo.composition.claims import capped
from fedcompo.composition.running_sum import RunningSum
from fedcompo.composition.totals import total_after
from fedcompo.config.choices import HeadStart, Method, Statistics, kinds_of
from fedcompo.config.run import RunConfig
from fedcompo.config.setting import names_of
from fedcompo.data.tasks import one_of_each
from fedcompo.errors import ContributionError
from fedcompo.messages.answers import TrainAnswer
from fedcompo.messages.body import Body
from fedcompo.messages.requests import ANCHOR, Others, TrainRequest
from fedcompo.method.contribution import AnyStatistics, Contribution
from fedcompo.method.heads import Head
from fedcompo.method.lineage import Lineage
from fedcompo.method.statistics import FeatureSums, total_of
from fedcompo.method.task_vector import TaskVector
from fedcompo.registry.admission import admit, outliers
from fedcompo.registry.company import Company, Known
from fedcompo.registry.registry import Registry
from server.exchange.checks import checked_fractions, checked_losses
from server.exchange.exchange import Exchange
from server.phases import roster
from server.phases.fisher import Fishers, fisher_apart
from server.phases.remarks import remarks
from server.phases.roster import KeepFisher, Roster
from server.phases.weight import leave_out_strange, weighed

INCOMING = "incoming"
"""Folder of a run for contributions that are not in the registry yet."""


def phases_of(config: RunConfig) -> tuple[str, ...]:
    """The phases of fitting."""
    own = ("fisher",) if fisher_apart(config) else ()
    return (*roster.phases_of(config), *own, "train")


@dataclass
class Fitting:
    """Asks clients for contributions."""

    roster: Roster
    """Who the clients are."""
    config: RunConfig
    registry: Registry
    """The registry that the clients of this run join."""
    contributions: Path
    """Folder of contributions that are not in the registry yet, with a sub-folder for each."""
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What clients reported, by client."""
    ensembled: bool = False
    """Whether clients train inside the sum of the others."""
    admitted: dict[str, Known] = field(default_factory=dict)
    """What is known of the last task vector that each client sent."""

    def __post_init__(self) -> None:
        """Read the reference before any client is asked; raises if that fails."""
        self.exchange: Exchange = self.roster.exchange
        self.backbone: Backbone = self.roster.backbone
        self.kinds = kinds_of(self.config.train.kind)
        self.settings = self.registry.settings
        shared = self.roster, self.config, self.registry, self.contributions, self.figures
        self.fishers = Fishers(*shared, self.ensembled)

    def run(self) -> None:
        """Do all phases; afterwards a contribution of each trained client is in its folder."""
        self.describe()
        self._prepare(self.roster.newcomers, decisive=True)
        self.train()

    def folder(self, client: str) -> Path:
        """Where a client's contribution lies."""
        return self.contributions / client

    # -- describe, and align ----------------------------------------------------------------------

    def describe(self) -> None:
        """Ask clients to describe themselves; settle who takes part, and with which kind.

        Kinds are dealt before clients are excluded: excluding one does not change another's kind.
        """
        asked = self.roster.participants.asked
        self.roster.gather(asked, keep_fisher=self._keep_fisher, kinds=self.kinds)
        if asked is None:
            self.roster.exclude(names_of(self.config.server.exclude))
        coming = self.roster.participants.described if asked is None else asked
        self.roster.settle(self.registry, self.config, coming)
        leave_out_strange(self.roster, self.roster.newcomers, self.registry)
        self.exchange.require_clients("describe")
        self.roster.require_newcomers(self.registry)

    @property
    def _keep_fisher(self) -> KeepFisher | None:
        """Takes the Fisher that comes with a description; None: it comes by itself."""
        return None if fisher_apart(self.config) else self.fishers.keep

    def _prepare(self, coming: Collection[str], *, decisive: bool) -> None:
        """Make all that described clients train with: the joint head, and the Fisher sum."""
        members = self.roster.participants.members
        self.roster.note_names({client: self.registry.member(client).classes for client in members})
        self.align()
        if fisher_apart(self.config):
            self.fishers.gather(coming, self.aligned, decisive=decisive)
        self.fishers.sum_up(notes=decisive)

    def align(self) -> None:
        """Make the joint head of all clients' statistics."""
        who = self.roster.participants
        self.settings, described = weighed(self.roster, self.settings)
        self._aligned_with = tuple(sorted({*who.members, *described}))
        statistics = {**described, **self._statistics_of({*who.members} - described.keys())}
        sums = [own for own in statistics.values() if isinstance(own, FeatureSums)]
        self._variance = total_of(sums).variance if sums else 0.0
        self.aligned = self.roster.align(statistics, self.config)

    def _statistics_of(self, members: Collection[str]) -> dict[str, AnyStatistics]:
        """Statistics of members, by name; of sums their total, from that of the registry."""
        if not members or self.registry.settings.statistics is Statistics.MIXTURES:
            cap, there = self.settings.class_cap, map(self.registry.contribution, members)
            return {own.client: capped(own.statistics, cap) for own in there}
        others = [self.registry.contribution(c) for c in self.registry.clients if c not in members]
        return {"": total_after(self.registry.total_statistics(), (), others, self.settings)}

    def _uses_joint_head(self, client: str) -> bool:
        """Whether a client trains with the joint head: from it, or with a Fisher under it.

        A client with a single class always starts from it.
        """
        alone = len(self.roster.participants.described[client].classes) == 1
        starts = alone or self.config.train.head_start is HeadStart.ALIGNED
        return starts or fisher_apart(self.config)

    # -- who comes and goes between rounds --------------------------------------------------------

    def take_in(self, clients: Iterable[str], *, decisive: bool) -> tuple[str, ...]:
        """Let clients join a run that is under way: they are described.

        Returns those that can be trained. The others are left out, but may come again. If it is
        decisive, the run fails if too few clients are left then.
        """
        clients = tuple(clients)
        keep = self._keep_fisher
        self.roster.gather(clients, keep_fisher=keep, kinds=self.kinds, decisive=decisive)
        leave_out_strange(self.roster, clients, self.registry)
        if coming := tuple(c for c in clients if c in self.roster.newcomers):
            self._prepare(coming, decisive=decisive)
        came = tuple(c for c in coming if c in self.roster.newcomers)
        self.roster.forget(set(coming) - set(came))
        return came

    def forget(self, clients: Collection[str]) -> None:
        """Go on without clients; delete what is kept of them."""
        self.roster.forget(clients)
        for client in clients:
            shutil.rmtree(self.folder(client), ignore_errors=True)
        self.fishers.sum_up()

    def leave_out(self, phase: str, reasons: Mapping[str, str]) -> None:
        """Go on without clients, connected at the moment or not; the books say why."""
        for client, reason in reasons.items():
            if client in self.exchange.clients:
                self.exchange.leave_out(phase, client, reason)
            else:
                self.exchange.books.miss(phase, client, reason)
        self.forget(reasons)

    # -- train ------------------------------------------------------------------------------------

    def train(self) -> None:
        """Let each client fit its task vector."""
        self.exchange.ask(
            "train", "train", self.train_request, self._fold_trained, clients=self.roster.newcomers
        )
        while long := outliers(self.roster.newcomers, self.company()):
            for client, reason in long.items():  # without them, the median is another
                self.exchange.leave_out("train", client, reason)
        self.exchange.require_clients("train")
        self.trained = self.roster.newcomers

    def remark(self, clients: Iterable[str]) -> None:
        """Note whose training came to nothing, of the clients that trained."""
        reported = {client: self.figures.get(client, {}) for client in sorted(clients)}
        for note in remarks(reported, strength="beta" if self.ensembled else "alpha"):
            self.exchange.books.note(note)

    def train_request(self, client: str) -> Body:
        """Request for a client: the joint head, the Fisher that anchors it, and in IEL the sum."""
        anchor = self.fishers.anchor_of(client)
        return TrainRequest(
            joint=self.aligned,
            kind=self.roster.participants.kinds[client],
            frozen=client in one_of_each(self.roster.newcomers),  # with the joint head
            needs={ANCHOR: ""} if anchor else {},
            sent={ANCHOR: anchor} if anchor else {},
            others=self._others_of(client) if self.ensembled else None,
        ).to_body()

    def _others_of(self, client: str) -> Others:
        """The sum of all members but the client itself, and the client's share beside them."""
        registry, times = self.registry, self.settings.times
        total = dict(registry.running_sum()) if registry.clients else {}
        others = RunningSum(self.backbone.theta_0, total=total)
        if client in registry.clients:  # what it trains takes the place of what it is there
            before = registry.contribution(client)
            others.vectors[client] = before.task_vector
            others.times[client] = times(before.num_examples)
        own = times(self.roster.participants.described[client].num_examples)
        together = registry.state.count - others.times.get(client, 0) + own
        rest, scale = others.rest(client, together=together), registry.settings.scale or 1.0
        return Others(rest=rest, share=own / together, scale=scale)

    def _fold_trained(self, client: str, body: Body) -> str:
        made, figures = self.check_trained(client, TrainAnswer.from_body(body))
        self.keep(made)
        self.note_figures(client, figures)
        return client

    def check_trained(
        self, client: str, answer: TrainAnswer
    ) -> tuple[Contribution, dict[str, Any]]:
        """Check and unpack what a client trained; raises ``ContributionError``."""
        vector = TaskVector(answer.kind, answer.task_vector, answer.base)
        if vector.kind is not (asked := self.roster.participants.kinds[client]):
            raise ContributionError(
                f"Client {client!r} sent a task vector of the kind {vector.kind}, it was asked for "
                f"{asked}. Use the same fedcompo version everywhere."
            )
        held = {} if answer.held is None else {"held": answer.held}
        figures = checked_fractions(client, {**answer.figures, **held})
        losses, head = checked_losses(client, answer), answer.head(answer.classes)
        made = self.contribution(client, vector, head, self.lineage(client))
        known = self.admitted[client] = admit(made, self.company(), empty=True)
        return made, {**figures, "losses": losses, "norm": known.norm}

    def note_figures(self, client: str, figures: Mapping[str, Any]) -> None:
        """Keep what a client reports of its training; its losses are appended to earlier ones."""
        known = self.figures.setdefault(client, {})
        known |= {**figures, "losses": [*known.get("losses", []), *figures["losses"]]}

    def keep(self, made: Contribution) -> None:
        """Write a client's contribution to its folder, and note how far it went."""
        client = made.client
        fisher = self.fishers.known(client) if self.config.server.keep_fisher else None
        distance = self.fishers.distance(client, made.task_vector, self._variance)
        self.figures.setdefault(client, {})["distance"] = distance
        replace(made, fisher=fisher).save(self.folder(client))

    def company(self) -> Company:
        """Return whom a contribution must go together with, and all that is known of them."""
        company = self.roster.company().held_to(self.config.server.max_norm_ratio)
        return company.joined({c: k for c, k in self.admitted.items() if c in company.members})

    def contribution(
        self, client: str, vector: TaskVector, head: Head, lineage: Lineage
    ) -> Contribution:
        """Make a client's contribution, without Fisher."""
        description = self.roster.participants.described[client]
        return Contribution(
            client=client,
            task_vector=vector,
            head=head,
            statistics=description.statistics,
            num_examples=description.num_examples,
            lineage=lineage,
            settings=dict(self.config.of_client()),
        )

    def lineage(self, client: str) -> Lineage:
        """Clients whose data shaped a client's contribution, besides its own."""
        members = self.roster.participants.members if self.ensembled else ()
        aligned_with = self._aligned_with if self._uses_joint_head(client) else ()
        return Lineage(
            method=str(Method.IEL if self.ensembled else Method.ITA),
            anchored_by=self.fishers.anchored_by(client),
            aligned_with=tuple(c for c in aligned_with if c != client),
            ensemble=tuple(c for c in members if c != client),
        )
