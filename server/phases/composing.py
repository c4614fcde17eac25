"""The second half of a run: compare task vectors, align the joint head again, measure the model.

Compose → realign → evaluate. It needs a registry and connected clients, not their training.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedcompo.backbone.backbone import Backbone
from fedcompo.composition.diagnostics import Diagnostics, diagnose
from fedcompo.messages.answers import EvaluateAnswer, RealignAnswer
from fedcompo.messages.body import Body
from fedcompo.messages.requests import EvaluateRequest, RealignRequest
from fedcompo.method.features import Mixtures
from fedcompo.method.fisher import FisherDiagonal
from fedcompo.method.heads import Head
from fedcompo.registry.registry import Registry
from server.exchange.checks import check_mixtures, checked_fractions
from server.exchange.exchange import Exchange

PHASES = ("compose", "realign", "evaluate")


@dataclass
class Composing:
    """Works on the current composition of a registry; a method for each of :data:`PHASES`."""

    exchange: Exchange
    backbone: Backbone
    registry: Registry
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    """What clients reported, by client."""

    @property
    def joint_head(self) -> Head:
        """The composed model's head."""
        return self.registry.joint_head()

    # -- compose ----------------------------------------------------------------------------------

    def compare(self, fisher: FisherDiagonal) -> None:
        """Compute the diagnostics of the members' task vectors.

        Args:
            fisher: *Sum* over clients; task vectors are compared in the metric of its mean.
        """
        settings, pool = self.registry.settings, self.registry.pool()
        times = {c.client: settings.times(c.num_examples) for c in pool}
        self.coefficients = {c: count / sum(times.values()) for c, count in times.items()}
        self.diagnostics: Diagnostics = diagnose(
            pool, self.backbone.theta_0, fisher.mean(), self.coefficients
        )
        for client in self.diagnostics.outliers:
            self.exchange.books.note(
                f"The task vector of {client} stands out by its length, or opposes the others: "
                "look at its data and its learning rate."
            )

    # -- realign ----------------------------------------------------------------------------------

    def realign(self) -> None:
        """Align the joint head again, on mixtures of the composed model's features.

        All members must describe these: a head aligned on some would favour their classes.
        """
        members, realigned = self.registry.clients, {}
        if not set(members) - set(self.exchange.clients):
            realigned = self._ask_mixtures(members)
        if missing := sorted(set(members) - set(realigned)):
            self.exchange.books.note(
                f"The joint head was not aligned again: {', '.join(missing)} did not describe the "
                "composed model's features. It stays aligned on pre-trained features."
            )
            return
        self.registry.realign(realigned)

    def _ask_mixtures(self, members: tuple[str, ...]) -> dict[str, Mixtures]:
        realigned: dict[str, Mixtures] = {}
        theta, linearised = self.registry.theta_p(), self.registry.linearised
        request = RealignRequest(theta=theta, linearised=linearised).to_body()

        def fold(client: str, body: Body) -> str:
            answer, classes = RealignAnswer.from_body(body), self.registry.member(client).classes
            check_mixtures(client, answer, classes, self.backbone.num_features)
            realigned[client] = answer.mixtures
            return client

        self.exchange.ask(
            "realign", "query.realign", lambda c: request, fold, decisive=False, clients=members
        )
        return realigned

    # -- evaluate ---------------------------------------------------------------------------------

    def evaluate(self, phase: str = "evaluate", *, decisive: bool = True) -> None:
        """Let each client measure the composed model on its own test images.

        Args:
            phase: Name of the phase.
            decisive: Fail if no client does.
        """
        request = EvaluateRequest(
            theta=self.registry.theta_p(),
            joint=self.joint_head,
            linearised=self.registry.linearised,
        ).to_body()
        asked = [client for client in self.exchange.clients if client in self.registry.clients]
        self.exchange.ask(
            phase, "evaluate", lambda c: request, self._fold, decisive=False, clients=asked
        )
        if decisive and not self.figures:
            self.exchange.require_clients(phase, ())

    def _fold(self, client: str, body: Body) -> str:
        self.figures[client] = checked_fractions(client, EvaluateAnswer.from_body(body).figures)
        return client
