"""Who takes part in a run, and what each client said of itself in the first phase."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fedcompo.backbone.backbone import Backbone
from fedcompo.config.choices import Kind
from fedcompo.errors import ContributionError
from fedcompo.messages.answers import FeaturesAnswer, IdentifyAnswer, Process
from fedcompo.messages.body import Body
from fedcompo.messages.requests import FeaturesRequest, IdentifyRequest
from fedcompo.method.features import Mixtures
from fedcompo.names import check_client_name
from fedcompo.runtime import check_versions
from server.exchange.books import NOTHING
from server.exchange.checks import check_backbone, check_mixtures
from server.exchange.exchange import Exchange

PHASE, NAMING = "features", "identify"


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
    tangent: bool | None = None
    """Whether this run's task vectors are tangents, which mix with no others; None: either."""
    names: set[str] = field(default_factory=set)
    """All who said who they are, whether they were described or not."""
    ambiguous: set[str] = field(default_factory=set)
    """Names that several nodes claimed."""
    late: bool = False
    """Whether those who are asked come to others, who are there already."""

    def identify(self, nodes: Iterable[str] | None = None) -> None:
        """Ask clients no more than who they are.

        Args:
            nodes: Provisional names of those to ask, who come late; None: everyone.
        """
        self.late = nodes is not None
        self.exchange.ask(
            NAMING,
            f"query.{NAMING}",
            lambda client: IdentifyRequest().to_body(),
            self._fold_identity,
            decisive=nodes is None,
            clients=nodes,
        )

    def gather(self, clients: Iterable[str] | None = None, *, decisive: bool = True) -> None:
        """Ask clients what their classes look like to the pre-trained backbone.

        Args:
            clients: Whom to ask; None: everyone.
            decisive: Fail if too few clients are left then.
        """
        self.exchange.ask(
            PHASE,
            f"query.{PHASE}",
            lambda client: FeaturesRequest().to_body(),
            self._fold,
            decisive=decisive,
            clients=clients,
        )

    def deal(self, kinds: tuple[Kind, ...]) -> dict[str, Kind]:
        """Deal kinds in turn, in the order of names; a client that insists on one gets that."""
        return {
            client: self.described[client].kind or kinds[index % len(kinds)]
            for index, client in enumerate(sorted(self.names))
            if client in self.described
        }

    def exclude(self, clients: Iterable[str]) -> None:
        """Leave clients out, as if they had said nothing; raises ``TooFewClients``."""
        came = ", ".join(sorted(self.names))
        for client in clients:
            if client in self.names & self.exchange.nodes.keys():
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

    def _fold_identity(self, client: str, body: Body) -> str:
        name = self._checked_name(client, IdentifyAnswer.from_body(body), body)
        self.names.add(name)
        return name

    def _checked_name(self, client: str, answer: IdentifyAnswer, body: Body) -> str:
        """Who a client is; refuses one that is another, or holds another backbone."""
        name = check_client_name(answer.client)
        registered = self.exchange.registered.get(self.exchange.nodes[client])
        if registered and name != registered:
            raise ContributionError(
                f"The node registered as {registered!r} calls itself {name!r}; it must use the "
                "name under which it is registered."
            )
        if client in self.names and name != client:
            raise ContributionError(f"Client {client!r} calls itself {name!r} now.")
        if name != client:
            self._refuse_twins(client, name)
        if (told := check_versions(name, Process.from_body(body).versions)) not in (
            "",
            *self.exchange.notes,
        ):
            self.exchange.note(told)
        check_backbone(name, answer.base, self.backbone)
        return name

    def _fold(self, client: str, body: Body) -> str:
        answer = FeaturesAnswer.from_body(body)
        name, kind = self._checked_name(client, answer, body), answer.kind
        check_mixtures(name, answer, answer.classes, self.backbone.num_features)
        if kind and self.tangent not in (None, kind is Kind.TANGENT):
            raise ContributionError(
                f"It insists on the kind {kind}, but tangents mix with no other kind. Give the "
                "node another `kind`, or let it take part in a run of its own."
            )
        self.described[name] = Description(
            classes=answer.classes,
            mixtures=answer.mixtures,
            num_examples=sum(mixture.num_examples for mixture in answer.mixtures.values()),
            num_test_examples=answer.num_test_examples,
            kind=kind,
        )
        self.names.add(name)
        return name

    def _refuse_twins(self, client: str, name: str) -> None:
        """Of two nodes with one name, neither can be trusted to be that client.

        In a run that is under way the one that took part stays. The other is asked again later: it
        may be the same client, come back before its old node was found to be gone.
        """
        reason = f"Two nodes call themselves {name!r}; give each node a name of its own."
        if name in self.exchange.nodes and self.late:
            self.exchange.look_anew(client)
            raise ContributionError(reason)
        if name in self.exchange.nodes:
            self.ambiguous.add(name)
            self.names.discard(name)
            self._leave_out(name, reason)
        if name in self.ambiguous:
            raise ContributionError(reason)

    def _leave_out(self, name: str, reason: str) -> None:
        """Forget a client that has been folded in."""
        self.described.pop(name, None)
        phase = PHASE if self.exchange.label(PHASE) in self.exchange.traffic else NAMING
        books = self.exchange.traffic[self.exchange.label(phase)]
        self.exchange.leave_out(phase, name, reason, books.pop(name, NOTHING))
