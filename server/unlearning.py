"""Take a client out of a registry, and tell, ask and measure those who stay.

identify → evaluate → remove → notify → realign → evaluate. The removal itself is the registry's and
needs nobody; the other phases do what they can with the clients that are connected. Who cannot be
reached does not hold it up: a client has the right to leave.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from logging import INFO
from typing import Any

from flwr.common.logger import log

from fedcompo.backbone import Backbone
from fedcompo.config import RegistryConfig, RunConfig
from fedcompo.errors import ContributionError
from fedcompo.messages import Body
from fedcompo.names import check_client_name
from fedcompo.pool import require_known
from fedcompo.registry import Registry
from fedcompo.removal import RemovalRecord
from server.checks import check_backbone
from server.composing import Composing
from server.exchange import Exchange

PHASES = ("identify", "evaluate before", "remove", "notify", "realign", "evaluate")


@dataclass
class Unlearning:
    """One removal; its phases are its methods, in the order of :data:`PHASES`."""

    exchange: Exchange
    config: RunConfig
    backbone: Backbone
    registry: Registry
    images: dict[str, int] = field(default_factory=dict)
    """Test images, by client."""
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    """Accuracies of the model that has the client, by those who stay."""
    after: dict[str, dict[str, float]] = field(default_factory=dict)
    """Accuracies of the model without it."""

    def __post_init__(self) -> None:
        """Refuse, before anyone is asked, to remove who is not there."""
        require_known([self.request.client], self.registry.clients, "registry")

    @property
    def request(self) -> RegistryConfig:
        """Who is to be removed, and on whose request."""
        return self.config.registry

    def run(self) -> None:
        """Do all phases; afterwards the attributes hold what there is to report."""
        self.identify()
        self.before = self.evaluate("evaluate before")
        self.exchange.timed("remove", self.remove)
        self.notify()
        self.composing = Composing(self.exchange, self.backbone, self.registry)
        if self.config.compose.realign and self.registry.clients:
            self.composing.realign()
        self.after = self.evaluate("evaluate")

    def identify(self) -> None:
        """Learn who is connected; only members that stay take part in what follows."""
        self.exchange.ask(
            "identify",
            "query.identify",
            lambda client: ({}, {}),
            self._fold_identity,
            decisive=False,
        )
        missing = sorted(set(self.registry.clients) - {*self.exchange.clients, self.request.client})
        if missing:
            self.exchange.note(
                f"Not connected, so neither asked nor told: {', '.join(missing)}. "
                "The removal does not wait for them."
            )

    def _fold_identity(self, client: str, body: Body) -> str:
        manifest = body[1]
        name = check_client_name(str(manifest["client"]))
        if name == self.request.client:
            raise ContributionError("This is the client to be removed; it is not asked again.")
        if name in self.exchange.nodes:
            raise ContributionError(
                f"Two nodes call themselves {name!r}; give each node a name of its own."
            )
        check_backbone(name, str(manifest["base"]), self.backbone)
        known = self.registry.member(name).classes
        if tuple(manifest["classes"]) != known:
            raise ContributionError(
                f"Client {name!r} has the classes {manifest['classes']} now; in the registry it "
                f"has {list(known)}."
            )
        self.images[name] = int(manifest["num_test_examples"])
        return name

    def evaluate(self, phase: str) -> dict[str, dict[str, float]]:
        """Let those who stay measure the current model; returns their figures, by client."""
        if not self.exchange.clients or not self.registry.clients:
            return {}
        composing = Composing(self.exchange, self.backbone, self.registry)
        composing.evaluate(phase, decisive=False)
        return {
            client: {**figures, "num_examples": self.images[client]}
            for client, figures in composing.figures.items()
        }

    def remove(self) -> None:
        """Remove the client from the registry."""
        self.record: RemovalRecord = self.registry.remove(
            self.request.client,
            requested_by=self.request.requested_by,
            reason=self.request.reason,
            keep_versions=self.request.keep_versions,
            on_step=lambda step: log(INFO, "remove: %s", step),
        )

    def notify(self) -> None:
        """Tell those who stay, and whom to train again if the influence shall go too."""
        retrain = self.record.influence.to_retrain

        def request(client: str) -> Body:
            text = (
                f"{self.record.client} left; the model holds nothing of its task vector any more."
            )
            if client in retrain:
                text += " This client was trained with something of it; train again to undo that."
            return {}, {"text": text, "record": self.record.text}

        if self.exchange.clients:
            self.exchange.ask(
                "notify", "query.notice", request, lambda client, body: client, decisive=False
            )

    def results(self) -> dict[str, Any]:
        """What there is to report, as JSON values."""
        path = self.registry.entries()[self.record.sequence - 1].details["record"]
        return {
            "removed": self.record.client,
            "record": str(self.registry.path / path),
            "root_before": self.record.root_before,
            "root_after": self.record.root_after,
            "root": self.registry.state.root,
            "survivors": list(self.record.survivors),
            "influence_exact": self.record.influence.exact,
            "to_retrain": list(self.record.influence.to_retrain),
            "joint_head": "realigned" if self.registry.realigned else "aligned",
            "accuracy_before": self.before,
            "accuracy_after": self.after,
        }
