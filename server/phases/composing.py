"""The second half of a run: compare the composed task vectors, and measure the model.

It needs a registry and connected clients, not their training. Between the two, the composition is
chosen; see :mod:`server.phases.choosing`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fedcompo.backbone.backbone import Backbone
from fedcompo.composition.diagnostics import Diagnostics, diagnose
from fedcompo.composition.models import times_of
from fedcompo.config.run import RunConfig
from fedcompo.data.tasks import one_of_each
from fedcompo.messages.answers import EvaluateAnswer
from fedcompo.messages.body import Body
from fedcompo.messages.requests import EvaluateRequest
from fedcompo.method.fisher import expanded
from fedcompo.method.heads import Head, zero_head
from fedcompo.method.kronecker import Metric
from fedcompo.registry.registry import Registry
from fedcompo.training.anchors import FisherSums
from server.exchange.checks import measured_in
from server.exchange.exchange import Exchange
from server.phases import choosing


def phases_of(config: RunConfig) -> tuple[str, ...]:
    """The phases of composing, choosing and measuring."""
    return ("compose", *choosing.phases_of(config), "evaluate")


@dataclass
class Composing:
    """Works on the current composition of a registry."""

    exchange: Exchange
    backbone: Backbone
    registry: Registry
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    """What clients reported, by client."""
    answers: dict[str, EvaluateAnswer] = field(default_factory=dict)
    """Whole, of the last measurement, by client."""

    # -- compose ----------------------------------------------------------------------------------

    def compare(self, sums: FisherSums | None) -> None:
        """Compute the diagnostics of the members' task vectors.

        Args:
            sums: Of the clients; task vectors are compared in the metric of their mean, or by plain
                squares if there is none.
        """
        theta_0, pool = self.backbone.theta_0, self.registry.pool()
        metric: Metric = {name: torch.ones_like(weight) for name, weight in theta_0.items()}
        if sums:
            metric = expanded(sums.total.mean(), theta_0)
        times = times_of(pool, self.registry.settings)
        self.coefficients = {c: count / sum(times.values()) for c, count in times.items()}
        self.diagnostics: Diagnostics = diagnose(pool, theta_0, metric, self.coefficients)
        for client in self.diagnostics.outliers:
            self.exchange.books.note(
                f"The task vector of {client} stands out by its length, or opposes the others: "
                "look at its data and its learning rate."
            )

    # -- evaluate ---------------------------------------------------------------------------------

    def evaluate(
        self, phase: str = "evaluate", *, decisive: bool = True, last: bool = True
    ) -> None:
        """Let each client measure the composed model on its own test images.

        Of a client with shards one of them measures, as all have the same test images.

        Args:
            phase: Its name.
            decisive: Whether it must succeed.
            last: Whether the clients' images are needed no more afterwards.

        Raises:
            TooFewClients: If no client does, where that is decisive.
        """
        request = EvaluateRequest(
            theta=self.registry.theta_p(),
            joint=self.registry.joint_head(),
            own_heads=self._own_heads(),
            linearised=self.registry.linearised,
            last=last or None,
        ).to_body()
        there = [client for client in self.exchange.clients if client in self.registry.clients]
        asked = one_of_each(there)
        self.exchange.ask(
            phase, "evaluate", lambda c: request, self._fold, decisive=False, clients=asked
        )
        if decisive and not self.figures:
            self.exchange.require_clients(phase, ())

    def _own_heads(self) -> Head:
        """The clients' own heads side by side; the mean of those that share a class."""
        heads = [self.registry.contribution(client).head for client in self.registry.clients]
        classes = self.registry.classes
        counts = torch.zeros(len(classes))
        total = zero_head(classes, self.backbone.num_features)
        for head in heads:
            rows = total.indices(head.classes)
            counts[rows] += 1
            total.weight[rows] += head.weight.float()
            total.bias[rows] += head.bias.float()
        return Head(classes, total.weight / counts.unsqueeze(1), total.bias / counts)

    def _fold(self, client: str, body: Body) -> str:
        own, known = self.registry.member(client).classes, self.registry.classes
        self.answers[client], self.figures[client] = measured_in(client, body, own, known)
        return client
