"""The first half of a run: every client describes itself, and fits its task vector.

Features → align → fisher → train. Under ITA each trains alone, under IEL inside the sum of those
who are in the registry; rounds in which all train at a time are in :mod:`server.rounds.rounds`.
Where clients start from the joint head or are anchored by the others, what one learns depends on
who else is there. Where each starts from its own probe and is anchored by its own Fisher or by a
reference, it does not, to the last bit: its lineage is empty.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcompo.backbone.backbone import Backbone
from fedcompo.composition.head import joint_head
from fedcompo.composition.running_sum import RunningSum
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import AnchorBy, HeadStart, Kind, Method, kinds_of
from fedcompo.config.run import RunConfig
from fedcompo.config.setting import names_of
from fedcompo.errors import ContributionError
from fedcompo.messages.answers import FisherAnswer, TrainAnswer
from fedcompo.messages.body import Body
from fedcompo.messages.requests import ANCHOR, FisherRequest, Others, TrainRequest, anchor_tensors
from fedcompo.method.contribution import Contribution, load_fisher, save_fisher
from fedcompo.method.deltas import Weights
from fedcompo.method.features import Mixtures
from fedcompo.method.fisher import HEAD, FisherDiagonal
from fedcompo.method.heads import Head
from fedcompo.method.lineage import Lineage
from fedcompo.method.task_vector import TaskVector
from fedcompo.registry.registry import Registry
from fedcompo.storage.files import FISHER
from fedcompo.training.anchors import FisherSums
from fedcompo.training.penalty import Anchor
from fedcompo.training.probing import load_reference
from server.exchange.checks import (
    Originals,
    check_fisher,
    checked_fisher,
    checked_fractions,
    checked_task_vector,
    norm_of,
    too_long,
)
from server.exchange.exchange import Exchange
from server.phases.roster import Roster

PHASES = ("features", "align", "fisher", "train")


@dataclass
class Fitting:
    """Asks for contributions; its phases are its methods, in the order of :data:`PHASES`."""

    exchange: Exchange
    config: RunConfig
    backbone: Backbone
    registry: Registry
    """Whose members the clients of this run join; nobody of them is trained again."""
    contributions: Path
    """Folder of the clients' contributions on their way to the registry, a sub-folder each."""
    roster: Roster
    """Who the clients are."""
    asked: tuple[str, ...] | None = None
    """Whose turn it is; None: everyone who is connected."""
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What clients reported, by client."""
    ensembled: bool = False
    """Whether clients train inside the sum of the others."""
    before: tuple[str, ...] | None = None
    """Members of the registry when the run began; None: those who are in it now."""
    absent: set[str] = field(default_factory=set)
    """Who takes part, but is not connected at the moment."""
    kinds: dict[str, Kind] = field(default_factory=dict)
    """Kind of task vector, by client."""
    described: dict[str, Mixtures] = field(default_factory=dict)
    """Mixtures that the joint head is aligned on, by client."""
    originals: Originals = field(default_factory=Originals)
    """Whose each task vector is."""

    def __post_init__(self) -> None:
        """Read what must be at hand before any client is asked; raises as reading it does."""
        self.reference = self._read_reference()

    def run(self) -> None:
        """Do all phases; afterwards a contribution of each trained client is in its folder."""
        self.gather_features()
        self.align()
        self.gather_fisher()
        self.train()

    @property
    def newcomers(self) -> tuple[str, ...]:
        """Clients still in the run that are to be trained now, sorted."""
        return tuple(
            client
            for client in self.exchange.clients
            if client not in self.members and (self.asked is None or client in self.asked)
        )

    @property
    def parties(self) -> tuple[str, ...]:
        """Who is trained in this run, also who is not connected at the moment; sorted."""
        described = self.roster.described
        return tuple(sorted({c for c in self.newcomers if c in described} | self.absent))

    def folder(self, client: str) -> Path:
        """Where a client's contribution lies."""
        return self.contributions / client

    # -- features ---------------------------------------------------------------------------------

    def gather_features(self) -> None:
        """Ask clients what their classes look like; settle who takes part, with which kind.

        Kinds are dealt before anyone is excluded, so that excluding one shifts nobody else's.
        """
        self.roster.gather(self.asked)
        self._deal_kinds()
        if self.asked is None:
            self.roster.exclude(names_of(self.config.server.exclude))
        self.settle_members(self.roster.described if self.asked is None else self.asked)
        self.roster.recognise({c: self.registry.member(c).classes for c in self.members})
        self.exchange.require_clients("features")
        if not self.newcomers:
            raise ContributionError(
                f"All connected clients are in the registry {self.registry.path} already: "
                f"{', '.join(self.exchange.clients)}. Train them anew with `replace = true`, or "
                "start others."
            )

    def settle_members(self, coming: Iterable[str]) -> None:
        """Settle whom of the registry nobody trains again: all but those who are replaced."""
        self.members = self.registry.clients if self.before is None else self.before
        if self.config.registry.replace:
            self.members = tuple(client for client in self.members if client not in coming)
        tangent = Kind.TANGENT in kinds_of(self.config.train.kind)
        if self.members and self.registry.linearised != tangent:
            raise ContributionError(
                f"`kind` is {self.config.train.kind}, but {self.members[0]} and all who stay in "
                f"the registry {self.registry.path} are {'' if not tangent else 'not '}of the kind "
                f"{Kind.TANGENT}, which mixes with no other. Use a registry of its own."
            )

    def take_in(self, clients: Iterable[str], *, decisive: bool) -> tuple[str, ...]:
        """Describe clients that come to those who are there: features → align → fisher.

        Args:
            clients: Who comes.
            decisive: Fail if too few clients are left then.

        Returns:
            Who of them can be trained. Whoever cannot is left out, but may come again.
        """
        clients = tuple(clients)
        self.roster.gather(clients, decisive=decisive)
        self._deal_kinds()
        if coming := tuple(c for c in clients if c in self.newcomers):
            self.align()
            self.gather_fisher(coming, decisive=decisive)
        for client in set(coming) - set(self.newcomers):
            del self.roster.described[client]
        return tuple(c for c in coming if c in self.newcomers)

    def forget(self, clients: Iterable[str]) -> None:
        """Go on without clients, and without what they said of themselves."""
        for client in clients:
            self.absent.discard(client)
            self.roster.described.pop(client, None)
            self.described.pop(client, None)
            shutil.rmtree(self.folder(client), ignore_errors=True)
        self._sum_fisher()

    def _deal_kinds(self) -> None:
        """Deal a kind to everyone who has none."""
        self.kinds = self.roster.deal(kinds_of(self.config.train.kind)) | self.kinds

    # -- align ------------------------------------------------------------------------------------

    def align(self) -> None:
        """Fit the joint head to features drawn from everyone's mixtures."""
        self.aligned: Head = self.exchange.timed("align", self._align)

    def _align(self) -> Head:
        self.described = {
            client: self.registry.contribution(client).features for client in self.members
        }
        self.described |= {c: self.roster.described[c].mixtures for c in self.parties}
        return joint_head(
            self.described,
            CompositionSettings.of(self.config),
            purpose="align",
        )

    @property
    def _starts_aligned(self) -> bool:
        return self.config.train.head_start is HeadStart.ALIGNED

    # -- fisher -----------------------------------------------------------------------------------

    def gather_fisher(
        self, clients: tuple[str, ...] | None = None, *, decisive: bool = True
    ) -> None:
        """Ask for Fisher diagonals under the head that training starts from; keep each on disk.

        Args:
            clients: Whom to ask; None: everyone who is to be trained.
            decisive: Fail if nobody sends one, or too few clients are left then.
        """
        request = FisherRequest(joint=self.aligned if self._starts_aligned else None).to_body()
        asked = self.newcomers if clients is None else clients
        self.exchange.ask(
            "fisher",
            "query.fisher",
            lambda client: request,
            self._fold_fisher,
            decisive=decisive,
            clients=asked,
        )
        if decisive and not set(asked) & set(self.exchange.clients):
            raise ContributionError(f"No Fisher came of {', '.join(asked) or 'any client'}.")
        known = [c for c in self.members if FISHER in self.registry.member(c).files]
        if without := sorted(set(self.members) - set(known)):
            self.exchange.note(
                f"The registry keeps no Fisher of {', '.join(without)}: the clients of this run "
                "are not anchored by theirs."
            )
        self._sum_fisher()
        if note := self.anchors.note(self.strength, setting="beta" if self.ensembled else "alpha"):
            self.exchange.note(note)

    def _sum_fisher(self) -> None:
        """Sum the Fisher of all who take part, as far as it is known."""
        known = [c for c in self.members if FISHER in self.registry.member(c).files]
        parties = [c for c in self.parties if (self.folder(c) / FISHER).exists()]
        if everyone := (*known, *parties):
            self.anchors = FisherSums.of(
                everyone,
                self._load_fisher,
                by=self.config.train.anchor,
                reference=self.reference,
            )

    def _fold_fisher(self, client: str, body: Body) -> str:
        starts_from = self.aligned if self._starts_aligned else self.roster.described[client]
        answer = FisherAnswer.from_body(body)
        fisher = checked_fisher(client, answer, self.backbone, starts_from.classes)
        base = self.backbone.fingerprint
        save_fisher(self.folder(client) / FISHER, fisher, client=client, base=base)
        self.figures.setdefault(client, {})["fisher"] = answer.report
        return client

    def _load_fisher(self, client: str) -> FisherDiagonal:
        if client in self.members:
            fisher = self.registry.contribution(client, with_fisher=True).fisher
            assert fisher is not None
            return fisher
        path = self.folder(client) / FISHER
        return load_fisher(path, client=client, base=self.backbone.fingerprint)

    def _read_reference(self) -> FisherDiagonal | None:
        if self.config.train.anchor is not AnchorBy.REFERENCE:
            return None
        path = Path(self.config.train.reference).expanduser()
        fisher = load_reference(path, base=self.backbone.fingerprint)
        check_fisher(fisher, self.backbone, (), f"the reference {path}")
        return fisher

    # -- train ------------------------------------------------------------------------------------

    def train(self) -> None:
        """Let every client fit its task vector, near the pre-trained weights or near the others."""
        self.exchange.ask(
            "train", "train", self.train_request, self._fold_trained, clients=self.newcomers
        )
        norms = {client: self.figures[client]["norm"] for client in self.newcomers}
        for client, reason in too_long(norms, self.config.server.max_norm_ratio).items():
            self.exchange.leave_out("train", client, reason)
        self.exchange.require_clients("train")
        self.trained = self.newcomers

    def train_request(self, client: str) -> Body:
        """The metric, and the joint head: to start from, or only to measure the frozen backbone.

        A client that trains inside the sum of the members (IEL) is sent that sum, too.
        """
        anchor = self.anchor_of(client)
        return TrainRequest(
            joint=self.aligned,
            kind=self.kinds[client],
            frozen=True,
            needs={ANCHOR: ""} if anchor else {},
            sent={ANCHOR: anchor} if anchor else {},
            others=self._others_of(client) if self.ensembled else None,
        ).to_body()

    def _others_of(self, client: str) -> Others:
        """The sum of the members but for the client itself, and its share beside them."""
        registry, times = self.registry, self.registry.settings.times
        total = dict(registry.running_sum()) if registry.clients else {}
        others = RunningSum(self.backbone.theta_0, total=total)
        if client in registry.clients:  # what it trains takes the place of what it is there
            before = registry.contribution(client)
            others.vectors[client] = before.task_vector
            others.times[client] = times(before.num_examples)
        own = times(self.roster.described[client].num_examples)
        together = registry.state.count - others.times.get(client, 0) + own
        rest, scale = others.rest(client, together=together), registry.settings.scale
        return Others(rest=rest, share=own / together, scale=scale)

    def anchor_of(self, client: str) -> Weights:
        """The mean Fisher that holds a client, head rows included; empty if there is none."""
        classes = self.roster.described[client].classes
        mean = self.anchors.mean_for(client, classes, with_own=self.ensembled)
        if mean is None:
            return {}
        weight, bias = (mean.pop(name) for name in HEAD)
        held = self.strength > 0 and any(bool(f.any()) for f in mean.values())
        return anchor_tensors(Anchor(mean if held else {}, weight, bias))

    @property
    def strength(self) -> float:
        """How firmly a Fisher holds a task vector."""
        return self.config.method.beta if self.ensembled else self.config.train.alpha

    def _fold_trained(self, client: str, body: Body) -> str:
        vector, head, figures = self.check_trained(client, TrainAnswer.from_body(body))
        self.keep(client, vector, head, self.lineage(client))
        self.note_figures(client, figures)
        return client

    def check_trained(
        self, client: str, answer: TrainAnswer
    ) -> tuple[TaskVector, Head, dict[str, Any]]:
        """Check what a client trained, and its figures; raises ``ContributionError``."""
        vector = checked_task_vector(client, answer, self.backbone)
        if vector.kind is not self.kinds[client]:
            raise ContributionError(
                f"Client {client!r} sent a task vector of the kind {vector.kind}, it was asked for "
                f"{self.kinds[client]}. Use the same fedcompo version everywhere."
            )
        self.originals.check(client, vector)
        head = answer.head(answer.classes)
        classes = self.roster.described[client].classes
        head.check(classes, self.backbone.num_features, f"client {client!r}")
        figures, losses = checked_fractions(client, answer.figures), list(answer.losses)
        if not losses or not all(map(math.isfinite, losses)):
            raise ContributionError(f"Client {client!r} reports the losses {losses}.")
        norm = norm_of(vector, self.backbone.theta_0)
        return vector, head, {**figures, "losses": losses, "norm": norm}

    def note_figures(self, client: str, figures: Mapping[str, Any]) -> None:
        """Keep what a client reports of its training; losses come after those of earlier rounds."""
        known = self.figures.setdefault(client, {})
        known |= {**figures, "losses": [*known.get("losses", []), *figures["losses"]]}

    def keep(self, client: str, vector: TaskVector, head: Head, lineage: Lineage) -> None:
        """Write a client's contribution to its folder."""
        description = self.roster.described[client]
        Contribution(
            client=client,
            task_vector=vector,
            head=head,
            features=dict(description.mixtures),
            num_examples=description.num_examples,
            lineage=lineage,
            fisher=self._load_fisher(client) if self.config.server.keep_fisher else None,
            settings=dict(self.config.of_client()),
        ).save(self.folder(client))

    def lineage(self, client: str) -> Lineage:
        """Whose data a client's contribution was made with, besides its own."""
        ensembled = self.ensembled
        anchored = self.strength > 0 or self.config.train.head_alpha > 0
        others = sorted(set(self.described) - {client})
        return Lineage(
            method=str(Method.IEL if ensembled else Method.ITA),
            anchored_by=self.anchors.others(client) if anchored else (),
            aligned_with=tuple(others) if self._starts_aligned else (),
            ensemble=tuple(c for c in self.members if c != client) if ensembled else (),
        )
