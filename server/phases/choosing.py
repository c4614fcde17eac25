r"""Align the joint head on the composed model's features, and choose λ by the clients' votes.

Realign → vote. The clients describe their images under the model of each λ that is tried; from the
sum of these statistics follows its joint head; on the images that they keep aside the clients say
how well each model does under it (:mod:`fedcompo.composition.voting`). λ = 0, the frozen backbone,
is among them: what is chosen is never worse there than not training.

Where λ is fixed, a member is missing, statistics are under noise, or images were not kept aside,
there is no vote: the head alone is aligned again, at the registry's own factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from typing import Any

from fedcompo.composition.claims import capped
from fedcompo.composition.fixed_point import GRID
from fedcompo.composition.head import head_from_total
from fedcompo.composition.settings import most_of
from fedcompo.composition.voting import Votes, elected, scales
from fedcompo.config.choices import AUTO, Statistics
from fedcompo.config.run import RunConfig
from fedcompo.messages.answers import RealignAnswer, VoteAnswer
from fedcompo.messages.body import Body
from fedcompo.messages.requests import RealignRequest, VoteRequest
from fedcompo.method.contribution import AnyStatistics
from fedcompo.method.deltas import Weights
from fedcompo.method.heads import Head
from fedcompo.method.statistics import FeatureSums
from fedcompo.registry.admission import check_features
from fedcompo.registry.registry import Registry
from server.exchange.checks import checked_votes, too_large
from server.exchange.exchange import Exchange
from server.phases.roster import Roster


@dataclass
class Described:
    """Statistics of the features of several models; sums are added up as they arrive."""

    totals: list[FeatureSums] = field(default_factory=list)
    """Of each model, over the images of all these clients."""
    mixtures: dict[str, AnyStatistics] = field(default_factory=dict)
    """Of the only model, by client."""

    def take(self, client: str, statistics: Sequence[AnyStatistics]) -> None:
        """Take a client's answer in, of each model; raises ``ContributionError`` and takes none."""
        sums = [own for own in statistics if isinstance(own, FeatureSums)]
        if len(sums) < len(statistics):
            (self.mixtures[client],) = statistics
        elif self.totals:
            self.totals = [a + b for a, b in zip(self.totals, sums, strict=True)]
        else:
            self.totals = sums

    def of_model(self, place: int) -> FeatureSums | dict[str, AnyStatistics]:
        """What a registry aligns its head by."""
        return self.mixtures or self.totals[place]


def phases_of(config: RunConfig) -> tuple[str, ...]:
    """The phases of choosing."""
    if not config.compose.realign:
        return ()
    sums, auto = config.head.statistics is Statistics.SUMS, config.compose.scale == AUTO
    return ("realign", "vote") if sums and auto else ("realign",)


@dataclass
class Choosing:
    """Works on the current composition of a registry."""

    roster: Roster
    registry: Registry
    config: RunConfig
    votes: int = 0
    """Images that voted."""
    tried: list[dict[str, float]] = field(default_factory=list)
    """Candidates with their scores, as JSON values."""

    def __post_init__(self) -> None:
        """Set up the conversation."""
        self.exchange: Exchange = self.roster.exchange

    def run(self) -> None:
        """Do both phases."""
        reason = self._reason()
        if not reason and self._elect():
            return
        described = self._describe((self.registry.factor,), vote=False)
        if described is None:
            self.exchange.books.note(
                f"The joint head was not aligned again: {', '.join(self._missing())} did not "
                "describe the composed model's features. It stays aligned on pre-trained features."
            )
            self.note_no_vote("not all members are there")
            return
        self.registry.realign(described.of_model(0))
        self.note_no_vote(reason or "nobody keeps an image aside")

    def report(self) -> dict[str, Any]:
        """What was chosen and what every candidate scored, as JSON values."""
        return {
            "scale": self.registry.scale,
            "factor": self.registry.factor,
            "by": str(self.registry.state.factor_by),
            "shrinkage": self.registry.state.shrinkage,
            "votes": self.votes,
            "candidates": self.tried,
        }

    def note_no_vote(self, reason: str) -> None:
        """Note why λ was not voted on, where it is not fixed."""
        if self.registry.settings.scale is None:
            self.exchange.books.note(
                f"λ was not voted on: {reason}. It is {self.registry.scale:.3g} "
                f"(by {self.registry.state.factor_by})."
            )

    def _missing(self) -> list[str]:
        """Members that are not connected, or failed before."""
        return sorted(set(self.registry.clients) - {*self.exchange.clients})

    def _reason(self) -> str:
        """Why there is no vote; empty if there is one."""
        if given := self.registry.settings.factor_given:
            return f"the registry composes {given}"
        if noised := sorted(self.roster.participants.noised & {*self.registry.clients}):
            return f"the statistics of {', '.join(noised)} are under noise"
        if not self.config.train.aside > 0:
            return "`aside` is 0"
        trained = ", ".join(c for c in self.registry.clients if not self._kept_aside(c))
        if trained:
            return f"{trained} trained on the images to vote on (another `aside` or `seed`)"
        return ""

    def _kept_aside(self, client: str) -> bool:
        """Whether a member trained without the images that it keeps aside in this run."""
        then = RunConfig.stored(self.registry.card(client)["settings"])
        now = self.config
        return (then.train.aside, then.seed) == (now.train.aside, now.seed)

    def _elect(self) -> bool:
        """Let the clients choose λ; returns whether anybody did."""
        tried, together = scales(len(self.registry.clients)), self.registry.state.count
        factors = tuple(scale / together for scale in tried)
        described = self._describe(factors, vote=True)
        if described is None:
            return False
        votes = self._vote(factors, tuple(map(head_from_total, described.totals)))
        if votes is None:
            return False
        place = elected(votes.losses)
        self.registry.realign(described.of_model(place), factor=factors[place])
        self.votes = votes.num_examples
        self.tried = [
            {"scale": scale, "loss": loss / self.votes, "accuracy": hits / self.votes}
            for scale, loss, hits in zip(tried, votes.losses, votes.hits, strict=True)
        ]
        return True

    def _describe(self, factors: tuple[float, ...], *, vote: bool) -> Described | None:
        """Ask for statistics under the model of each factor; None unless all members send them."""
        if self._missing():
            return None
        described, squares = Described(), dict[str, list[float]]()
        form, width = self.registry.settings.statistics, self.roster.backbone.num_features
        request = RealignRequest(
            total=self._total(),
            linearised=self.registry.linearised,
            factors=factors,
            form=form,
            vote=vote,
        ).to_body()

        def fold(client: str, body: Body) -> str:
            answer, classes = RealignAnswer.from_body(body), self.registry.member(client).classes
            if len(answer.statistics) != len(factors):
                raise ValueError(f"it describes {len(answer.statistics)} models of {len(factors)}")
            for own in answer.statistics:
                check_features(own, classes, width, form, f"client {client!r}")
            cap = self.registry.settings.class_cap
            described.take(client, [capped(own, cap) for own in answer.statistics])
            squares[client] = [
                o.mean_square for o in answer.statistics if isinstance(o, FeatureSums)
            ]
            return client

        clients = self.registry.clients
        self.exchange.ask(
            "realign", "query.realign", lambda c: request, fold, decisive=False, clients=clients
        )
        for own in zip(*squares.values(), strict=True):
            seconds = dict(zip(squares, own, strict=True))
            for client, reason in too_large("second moment of the features", seconds).items():
                if client in self.exchange.clients:
                    self.exchange.leave_out("realign", client, reason)
        return None if self._missing() else described

    def _vote(self, factors: tuple[float, ...], heads: tuple[Head, ...]) -> Votes | None:
        """Ask all members how well each model does under its head; None if nobody says so."""
        by_client: dict[str, Votes] = {}
        request = VoteRequest(
            total=self._total(), linearised=self.registry.linearised, factors=factors, heads=heads
        ).to_body()

        def fold(client: str, body: Body) -> str:
            by_client[client] = checked_votes(client, VoteAnswer.from_body(body), len(heads))
            return client

        clients = self.registry.clients
        self.exchange.ask(
            "vote", "query.vote", lambda c: request, fold, decisive=False, clients=clients
        )
        there = [by_client[client] for client in sorted(by_client)]
        ratio = self.config.compose.max_count_ratio
        most = most_of((own.num_examples for own in there if own.num_examples), ratio)
        together = reduce(add, (own.capped(most) for own in there)) if there else None
        return together if together and together.num_examples else None

    def _total(self) -> Weights:
        """What the rule makes of the members' task vectors, in the size of a sum; float32."""
        total = self.registry.total()
        return {name: total[name].double().mul_(GRID).float() for name in total}
