"""What a run does to get from connected clients to one model: fit, compose, realign, evaluate.

ITA: every client trains alone, held near the pre-trained weights by a Fisher diagonal (see
:mod:`fedcompo.training.anchors`). IEL: clients train in rounds inside their sum
(:mod:`server.rounds.rounds`). Either way the server adds up what comes back. It holds no data:
statistics, sums and task vectors are all it sees. What they add up to lives in a registry: a new
one, or one whose members the clients join.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from logging import INFO
from pathlib import Path
from typing import Any, ClassVar

from flwr.common.logger import log

from fedcompo.backbone.backbone import Backbone
from fedcompo.config.choices import Kind, Method, kinds_of
from fedcompo.config.run import RunConfig
from fedcompo.config.setting import names_of
from fedcompo.registry.registry import Registry
from server.exchange.exchange import Exchange
from server.phases import composing, fitting
from server.phases.composing import Composing
from server.phases.fitting import Fitting
from server.phases.roster import Participants, Roster
from server.resume import Working
from server.rounds.holdings import LastSent
from server.rounds.rounds import Rounds

INCOMING = "incoming"


@dataclass
class Strategy(ABC):
    """One run: contributions are fitted, then composed."""

    exchange: Exchange
    config: RunConfig
    backbone: Backbone
    registry: Registry
    working: Working

    phases: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        """Refuse a reference Fisher that cannot be used, before any client is asked."""
        tangent = Kind.TANGENT in kinds_of(self.config.train.kind)
        members = Participants(members=self.working.members)
        self.roster = Roster(self.exchange, self.backbone, members, tangent=tangent)
        self.figures: dict[str, dict[str, Any]] = {}
        self.fitting = self.new_fitting()
        self.composing = Composing(self.exchange, self.backbone, self.registry)
        self.trained: tuple[str, ...] = ()

    def new_fitting(self) -> Fitting:
        """What asks those on the roster for contributions."""
        return Fitting(
            self.exchange,
            self.config,
            self.backbone,
            self.registry,
            self.output / INCOMING,
            self.roster,
            self.figures,
            ensembled=self.config.method.method is Method.IEL,
        )

    def run(self) -> None:
        """Do all phases; afterwards the parts hold what there is to report."""
        folders = self.fit()
        self.exchange.books.timed("compose", lambda: self.compose(folders))
        self.look()

    def identify(self) -> None:
        """Learn who is connected, and settle whom of the registry nobody trains again."""
        self.roster.identify()
        self.roster.exclude(names_of(self.config.server.exclude))
        self.roster.settle(self.registry, self.config, self.exchange.clients)
        self.roster.require_newcomers(self.registry)

    @property
    def output(self) -> Path:
        """The run's own folder."""
        return self.working.output

    @abstractmethod
    def fit(self) -> list[Path]:
        """Let clients train; returns the folders of their contributions."""

    def compose(self, folders: list[Path]) -> None:
        """Add contributions to the registry, which adds them up; they then live there alone."""
        if not self.working.joined(self.registry, {folder.name: folder for folder in folders}):
            self.registry.add(
                *folders,
                replacing=self.config.registry.replace,
                on_step=lambda step: log(INFO, "registry: %s", step),
            )
        shutil.rmtree(self.fitting.contributions)
        self.composing.compare(self.fitting.fishers.anchors.total)

    def look(self, *, decisive: bool = True) -> None:
        """Align the joint head again, and measure.

        Args:
            decisive: Fail if nobody measures.
        """
        if self.config.compose.realign:
            self.composing.realign()
        self.composing.evaluate(decisive=decisive)

    def report(self) -> dict[str, Any]:
        """What this strategy has to report besides what all do, as JSON values."""
        return {}


class ItaStrategy(Strategy):
    """Everyone trains alone, all at once."""

    phases = (*fitting.PHASES, *composing.PHASES)

    def fit(self) -> list[Path]:
        """Fit everyone's task vector."""
        if self.working.resumed:  # what was answered before is known by the clients' names
            self.roster.identify()
        self.fitting.run()
        self.trained = self.fitting.trained
        return [self.fitting.folder(client) for client in self.trained]


class IelStrategy(Strategy):
    """Everyone trains inside the sum of all, in rounds."""

    phases = ("identify", *fitting.PHASES, *composing.PHASES)

    def fit(self) -> list[Path]:
        """Do the rounds."""
        self.identify()
        number, last = self.config.method.num_server_rounds, LastSent(self.output / "rounds")
        self.rounds = Rounds(self.fitting, number, last, working=self.working)
        self.rounds.run()
        self.trained = self.rounds.trained
        return self.rounds.keep()

    def compose(self, folders: list[Path]) -> None:
        """Add what the clients sent last to the registry."""
        super().compose(folders)
        self.rounds.last.clear()

    def report(self) -> dict[str, Any]:
        """What happened in each round."""
        return {"rounds": self.rounds.history}
