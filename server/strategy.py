"""Get from connected clients to one model: fit, compose, choose, evaluate.

Describe → train → compose → realign → vote → evaluate. ITA: each client trains alone, held near the
pre-trained weights by a Fisher diagonal (see :mod:`fedcompo.training.anchors`). IEL: clients train
in rounds inside their sum (:mod:`server.rounds.rounds`). In both the server adds up the task
vectors, in a registry: a new one, or one whose members the clients join. Then the clients choose
how much of the sum enters (:mod:`server.phases.choosing`). The server holds no data; it sees
statistics, sums, task vectors and votes.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedcompo.backbone.backbone import Backbone
from fedcompo.config.choices import Kind, Method, kinds_of
from fedcompo.config.run import RunConfig
from fedcompo.config.setting import names_of
from fedcompo.errors import ContributionError
from fedcompo.registry.company import Company
from fedcompo.registry.registry import Registry
from server.exchange.exchange import Exchange
from server.phases import composing, fitting
from server.phases.choosing import Choosing
from server.phases.composing import Composing
from server.phases.fitting import Fitting
from server.phases.participants import Participants
from server.phases.roster import Roster
from server.resume import Working
from server.rounds.holdings import ROUNDS, LastSent
from server.rounds.rounds import Rounds


@dataclass
class Strategy(ABC):
    """A run that fits contributions and composes them."""

    exchange: Exchange
    config: RunConfig
    backbone: Backbone
    registry: Registry
    working: Working

    def __post_init__(self) -> None:
        """Set up the phases; raises if the reference Fisher cannot be used."""
        tangent = Kind.TANGENT in kinds_of(self.config.train.kind)
        known = Participants(members=self.working.members, kinds=self.working.kinds)
        others = partial(Company.of, self.registry, self.backbone)
        self.roster = Roster(self.exchange, self.backbone, others, known, tangent=tangent)
        self.roster.on_kinds = self.working.deal
        self.figures: dict[str, dict[str, Any]] = {}
        self.fitting = self.new_fitting()
        self.composing = Composing(self.exchange, self.backbone, self.registry)
        self.choosing = Choosing(self.roster, self.registry, self.config)
        self.trained: tuple[str, ...] = ()

    @classmethod
    def phases_of(cls, config: RunConfig) -> tuple[str, ...]:
        """All phases, in their order."""
        first = ("identify",) if cls.identifies(config) else ()
        return (*first, *fitting.phases_of(config), *composing.phases_of(config))

    @classmethod
    def identifies(cls, config: RunConfig) -> bool:
        """Whether clients say who they are before they describe themselves."""
        return True

    def new_fitting(self) -> Fitting:
        """The phases that ask clients for contributions."""
        return Fitting(
            self.roster,
            self.config,
            self.registry,
            self.working.output / fitting.INCOMING,
            self.figures,
            ensembled=self.config.method.method is Method.IEL,
        )

    def run(self) -> None:
        """Do all phases; afterwards ``fitting`` and ``composing`` hold the figures."""
        folders = self.fit()
        self.exchange.books.timed("compose", lambda: self.compose(folders))
        self.look()

    def identify(self) -> None:
        """Learn who is connected, and settle whom of the registry nobody trains again."""
        self.roster.identify()
        self.roster.exclude(names_of(self.config.server.exclude))
        self.roster.settle(self.registry, self.config, self.exchange.clients)
        self.roster.require_newcomers(self.registry)

    @abstractmethod
    def fit(self) -> list[Path]:
        """Let clients train; returns the folders of their contributions."""

    def compose(self, folders: list[Path]) -> None:
        """Add contributions to the registry, which adds them up; delete them elsewhere.

        Whom the registry refuses by name is left out. The others are added at once.
        """
        coming = {folder.name: folder for folder in folders}
        while not self.working.joined(self.registry, coming):
            try:
                replacing = self.config.registry.replace
                self.registry.add(*coming.values(), replacing=replacing, empty=True)
                break
            except ContributionError as error:
                if error.client not in coming:
                    raise
                del coming[error.client]
                self.trained = tuple(c for c in self.trained if c != error.client)
                self.fitting.leave_out("compose", {error.client: str(error)})
                self.exchange.require_clients("compose", self.trained)
        shutil.rmtree(self.fitting.contributions)
        self.composing.compare(self.fitting.fishers.sums)
        self.fitting.remark(coming)

    def look(self, *, decisive: bool = True, last: bool = True) -> None:
        """Choose λ, align the joint head again, and measure; decisive: fail if nobody does."""
        self.choosing = Choosing(self.roster, self.registry, self.config)
        if self.config.compose.realign:
            self.choosing.run()
        else:
            self.choosing.note_no_vote("`realign` is false")
        self.composing.evaluate(decisive=decisive, last=last)

    def report(self) -> dict[str, Any]:
        """Results of this strategy alone, as JSON values."""
        return {}


class ItaStrategy(Strategy):
    """All clients train alone, at the same time."""

    @classmethod
    def identifies(cls, config: RunConfig) -> bool:
        """Where kinds are dealt by name: one that fails to describe itself changes nobody's."""
        return len(set(kinds_of(config.train.kind))) > 1

    def fit(self) -> list[Path]:
        """Fit each client's task vector."""
        # Answers are kept under the clients' names.
        if self.working.resumed or self.identifies(self.config):
            self.roster.identify()
        self.fitting.run()
        self.trained = self.fitting.trained
        return [self.fitting.folder(client) for client in self.trained]


class IelStrategy(Strategy):
    """All clients train inside their sum, in rounds."""

    def fit(self) -> list[Path]:
        """Do the rounds."""
        self.identify()
        number, last = self.config.method.num_server_rounds, LastSent(self.working.output / ROUNDS)
        self.rounds = Rounds(self.fitting, number, last, working=self.working)
        self.rounds.run()
        self.trained = self.rounds.sum.trained
        return self.rounds.sum.keep()

    def compose(self, folders: list[Path]) -> None:
        """Add the clients' last task vectors to the registry."""
        super().compose(folders)
        self.rounds.last.clear()

    def report(self) -> dict[str, Any]:
        """The history of the rounds."""
        return {"rounds": self.rounds.history}
