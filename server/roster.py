"""Who takes part in a run, and what each client said of itself in the first phase."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fedcompo.backbone import Backbone
from fedcompo.config import Kind
from fedcompo.errors import ContributionError
from fedcompo.messages import Body
from fedcompo.names import check_client_name
from server.alignment import Mixtures
from server.checks import check_backbone, checked_mixtures
from server.exchange import Exchange

PHASE = "features"


@dataclass(frozen=True)
class Description:
    """What a client said of itself."""

    classes: tuple[str, ...]
    mixtures: Mixtures
    num_examples: int
    num_test_examples: int
    kind: Kind | None
    """Kind of task vector it insists on."""


@dataclass
class Roster:
    """Asks the clients who they are, and remembers."""

    exchange: Exchange
    backbone: Backbone
    described: dict[str, Description] = field(default_factory=dict)
    """All that could be used then, also those left out later; by name."""
    ambiguous: set[str] = field(default_factory=set)
    """Names that several nodes claimed."""

    def gather(self) -> None:
        """Ask every client what its classes look like to the pre-trained backbone."""
        self.exchange.ask(PHASE, f"query.{PHASE}", lambda client: ({}, {}), self._fold)

    def deal(self, kinds: tuple[Kind, ...]) -> dict[str, Kind]:
        """Deal kinds in turn, in the order of names; a client that insists on one gets that."""
        return {
            client: self.described[client].kind or kinds[index % len(kinds)]
            for index, client in enumerate(sorted(self.described))
        }

    def exclude(self, clients: Iterable[str]) -> None:
        """Leave clients out, as if they had said nothing; raises ``TooFewClients``."""
        came = ", ".join(sorted(self.described))
        for client in clients:
            if client in self.described:
                self._leave_out(client, "excluded by `exclude`")
            elif client not in self.ambiguous:
                self.exchange.note(f"`exclude` names {client!r}, but only {came} came.")
        self.exchange.require_clients(PHASE)

    def recognise(self, members: Mapping[str, tuple[str, ...]]) -> None:
        """Leave out clients that are members of the registry, but not what they were there.

        Args:
            members: Classes of each member, by name.
        """
        for client in sorted(members.keys() & self.described):
            found, known = self.described[client].classes, members[client]
            if found != known:
                self._leave_out(
                    client,
                    f"It has the classes {found} now; in the registry it has {known}. "
                    "Train it anew with `replace = true`, or give it another name.",
                )
        self.exchange.require_clients(PHASE)

    def _fold(self, client: str, body: Body) -> str:
        manifest = body[1]
        name = check_client_name(str(manifest["client"]))
        registered = self.exchange.registered.get(self.exchange.nodes[client])
        if registered and name != registered:
            raise ContributionError(
                f"The node registered as {registered!r} calls itself {name!r}; it must use the "
                "name under which it is registered."
            )
        self._refuse_twins(name)
        check_backbone(name, str(manifest["base"]), self.backbone)
        classes = tuple(manifest["classes"])
        mixtures = checked_mixtures(name, body, classes, self.backbone.num_features)
        kind = manifest.get("kind")
        self.described[name] = Description(
            classes=classes,
            mixtures=mixtures,
            num_examples=sum(mixture.num_examples for mixture in mixtures.values()),
            num_test_examples=int(manifest["num_test_examples"]),
            kind=Kind(kind) if kind else None,
        )
        return name

    def _refuse_twins(self, name: str) -> None:
        """Of two nodes with one name, neither can be trusted to be that client."""
        reason = f"Two nodes call themselves {name!r}; give each node a name of its own."
        if name in self.described:
            self.ambiguous.add(name)
            self._leave_out(name, reason)
        if name in self.ambiguous:
            raise ContributionError(reason)

    def _leave_out(self, name: str, reason: str) -> None:
        """Forget a client that has been folded in."""
        del self.described[name]
        cost = self.exchange.traffic[PHASE].pop(name)
        self.exchange.leave_out(PHASE, name, reason, cost)
