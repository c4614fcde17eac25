"""Find out who takes part in a run, and how each client describes itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from fedcompo.backbone.backbone import Backbone
from fedcompo.composition.head import joint_head
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Kind, Statistics, kinds_of
from fedcompo.config.run import RunConfig
from fedcompo.data.tasks import check_whole, members_of, shard_of, whole_of
from fedcompo.errors import ContributionError
from fedcompo.messages.answers import DescribeAnswer, FisherAnswer, IdentifyAnswer, Process
from fedcompo.messages.body import Body
from fedcompo.messages.requests import DescribeRequest, IdentifyRequest
from fedcompo.method.contribution import AnyStatistics
from fedcompo.method.heads import Head
from fedcompo.names import check_client_name
from fedcompo.registry.admission import check_described
from fedcompo.registry.company import Company, Known
from fedcompo.registry.registry import Registry
from fedcompo.report.newcomers import note_on_newcomers
from fedcompo.report.pictures import notes_on
from fedcompo.report.twins import note_on, twins
from fedcompo.runtime import check_versions
from server.exchange.books import NOTHING
from server.exchange.checks import check_backbone
from server.exchange.exchange import Exchange
from server.phases.participants import Participants

PHASE, NAMING, ALIGN = "describe", "identify", "align"
KeepFisher = Callable[[str, FisherAnswer], None]
"""Checks the Fisher that came with a client's description, then keeps it."""
Accept = Callable[[str, IdentifyAnswer], None]
"""Refuses a client by its name and answer: raises ``ContributionError``."""


def phases_of(config: RunConfig) -> tuple[str, ...]:
    """The phases until there is a joint head; of sums it takes milliseconds, and is no phase."""
    return (PHASE,) if config.head.statistics is Statistics.SUMS else (PHASE, ALIGN)


@dataclass
class Roster:
    """Asks the clients who they are, and records who takes part."""

    exchange: Exchange
    backbone: Backbone
    others: Callable[[], Company]
    """Returns who is there beside the clients of this run: the registry's members, or nobody."""
    participants: Participants = Participants()
    """The current value; only the roster replaces it."""
    tangent: bool | None = None
    """Whether the run's task vectors are tangents, which mix with no other kind; None: either."""
    on_kinds: Callable[[Mapping[str, Kind]], None] = lambda kinds: None
    """Called with the kinds of all clients whenever some are dealt."""
    _late: bool = False
    """Whether the clients asked last came when the run was under way."""

    # -- who is there -----------------------------------------------------------------------------

    @property
    def newcomers(self) -> tuple[str, ...]:
        """Clients still in the run that are to be trained now, sorted."""
        return self.participants.newcomers(self.exchange.clients)

    @property
    def present(self) -> tuple[str, ...]:
        """Those of the newcomers that are described, sorted."""
        return tuple(c for c in self.newcomers if c in self.participants.described)

    @property
    def parties(self) -> tuple[str, ...]:
        """All clients that are trained in this run, connected at the moment or not; sorted."""
        return tuple(sorted({*self.present, *self.participants.absent}))

    def company(self) -> Company:
        """Return whom a contribution must go together with: the others, and who is described.

        What a member sent before stays its own, also while it is trained anew.
        """
        others, described = self.others(), self.participants.described
        before = {c: own.rounded_sha256 for c, own in others.members.items()}
        known = {c: Known(described[c].classes, None, before.get(c, "")) for c in self.parties}
        return others.joined(known)

    def require_newcomers(self, registry: Registry) -> None:
        """Raise ``ContributionError`` if no client is to be trained."""
        if not self.newcomers:
            raise ContributionError(
                f"All connected clients are in the registry {registry.path} already: "
                f"{', '.join(self.exchange.clients)}. Train them anew with `replace = true`, or "
                "start others."
            )

    def note_names(self, members: Mapping[str, Iterable[str]]) -> None:
        """Note classes that may be one, spelt differently, and who comes to a member's; once."""
        coming = {c: self.participants.described[c].classes for c in self.parties}
        parts = (members, coming)
        came = note_on_newcomers((i, *one) for i, part in enumerate(parts) for one in part.items())
        self.exchange.books.note(note_on(twins({**members, **coming})))
        self.exchange.books.note(came)

    def align(self, statistics: Mapping[str, AnyStatistics], config: RunConfig) -> Head:
        """Make the joint head of statistics by client; of mixtures, in a phase of its own."""
        settings = CompositionSettings.of(config)
        align = partial(joint_head, statistics, settings, purpose=ALIGN)
        return self.exchange.books.timed(ALIGN, align) if ALIGN in phases_of(config) else align()

    # -- who comes and goes -----------------------------------------------------------------------

    def exclude(self, clients: Iterable[str]) -> None:
        """Leave clients out and forget their descriptions; raises ``TooFewClients``."""
        who = self.participants
        came = ", ".join(sorted(who.names))
        for client in clients:
            if there := members_of(client, who.names & {*self.exchange.clients}):
                for member in there:
                    self.leave_out(member, "excluded by `exclude`")
            elif client not in who.ambiguous:
                self.exchange.books.note(f"`exclude` names {client!r}, but only {came} came.")
        self.exchange.require_clients(PHASE)

    def settle(self, registry: Registry, config: RunConfig, coming: Collection[str]) -> None:
        """Settle which members of the registry are not trained again: all that are not replaced.

        Such a member that is connected, but has other classes now, is left out. Those coming are
        replaced where the settings allow it.

        Raises:
            ContributionError: If the run's kind does not mix with that of the members.
        """
        who = self.participants
        replaced = coming if config.registry.replace else ()
        members = tuple(client for client in who.members if client not in replaced)
        tangent = Kind.TANGENT in kinds_of(config.train.kind)
        if members and registry.linearised != tangent:
            raise ContributionError(
                f"`kind` is {config.train.kind}, but {members[0]} and all who stay in "
                f"the registry {registry.path} are {'' if not tangent else 'not '}of the kind "
                f"{Kind.TANGENT}, which mixes with no other. Use a registry of its own."
            )
        self.participants = replace(who, members=members)
        self._leave_out_otherwise_dealt(registry, config.data.shards)
        for client in sorted({*members} & who.described.keys()):
            classes, known = who.described[client].classes, registry.member(client).classes
            if classes != known:
                self.leave_out(
                    client,
                    f"It has the classes {classes} now; in the registry it has {known}. "
                    "Train it anew with `replace = true`, or give it another name.",
                )

    def _leave_out_otherwise_dealt(self, registry: Registry, shards: int) -> None:
        """Leave out who has another number of shards in the registry: images would count twice."""
        there = {whole_of(member): member for member in registry.clients}
        for client in sorted(self.participants.names & {*self.exchange.clients}):
            member = there.get(whole_of(client), client)
            if shards == 1 and shard_of(member) is None:
                continue
            settings = registry.card(member)["settings"] if member in registry.clients else {}
            if settings and (dealt := RunConfig.stored(settings).data.shards) != shards:
                self.leave_out(
                    client,
                    f"The registry has {whole_of(client)!r} with `shards` = {dealt}, and this run "
                    f"sets {shards}. Set the same, or remove {whole_of(client)!r} first.",
                )

    def take_turn(self, clients: tuple[str, ...], members: Iterable[str]) -> None:
        """Let these clients be the only newcomers, and note who is a member by then."""
        self.participants = replace(
            self.participants, asked=clients, members=tuple(sorted(members))
        )

    def look_again(self) -> None:
        """Note which clients came or went since the last look; ask new nodes who they are."""
        nodes, gone = self.exchange.nodes.look_again()
        lost = self.participants.absent | (set(gone) & self.participants.described.keys())
        if nodes:
            self.identify(nodes)
        self.participants = replace(self.participants, absent=lost - {*self.exchange.clients})

    def forget(self, clients: Collection[str]) -> None:
        """Forget the descriptions of clients; they may come again."""
        self.participants = self.participants.without(clients)

    # -- who they say they are --------------------------------------------------------------------

    def identify(
        self, nodes: Iterable[str] | None = None, accept: Accept = lambda name, answer: None
    ) -> None:
        """Ask clients who they are, and nothing else; ``accept`` has the last word on each.

        Named are the nodes that came when the run was under way; None: ask all.
        """
        self._late = nodes is not None

        def fold(client: str, body: Body) -> str:
            answer = IdentifyAnswer.from_body(body)
            name = self._checked_name(client, answer, body)
            accept(name, answer)
            self._take_in(name, answer)
            return name

        self.exchange.ask(
            NAMING,
            f"query.{NAMING}",
            lambda client: IdentifyRequest().to_body(),
            fold,
            decisive=nodes is None,
            clients=nodes,
        )

    def gather(
        self,
        clients: Iterable[str] | None = None,
        *,
        keep_fisher: KeepFisher | None = None,
        kinds: tuple[Kind, ...] = (),
        decisive: bool = True,
    ) -> None:
        """Ask clients for statistics of their features, note on pictures, deal kinds to them.

        Args:
            clients: Whom to ask; None: everyone.
            keep_fisher: Takes their Fisher; None: do not ask for it.
            kinds: Kinds to deal; empty: deal none.
            decisive: Fail if too few clients are left then.
        """
        self.exchange.ask(
            PHASE,
            f"query.{PHASE}",
            lambda client: DescribeRequest(fisher=keep_fisher is not None).to_body(),
            lambda client, body: self._fold(client, body, keep_fisher),
            decisive=decisive,
            clients=clients,
        )
        described = self.participants.described
        for note in notes_on({c: about.pictures or {} for c, about in described.items()}):
            self.exchange.books.note(note)
        if kinds:
            self.participants = self.participants.with_kinds(kinds)
            self.on_kinds(self.participants.kinds)

    def _fold(self, client: str, body: Body, keep_fisher: KeepFisher | None) -> str:
        answer = DescribeAnswer.from_body(body)
        name, kind = self._checked_name(client, answer, body), answer.kind
        check_described(name, answer.classes, answer.statistics, self.company())
        if kind and self.tangent not in (None, kind is Kind.TANGENT):
            raise ContributionError(
                f"It insists on the kind {kind}, but tangents mix with no other kind. Give the "
                "node another `kind`, or let it take part in a run of its own."
            )
        if keep_fisher:
            if answer.fisher is None:
                raise ContributionError(
                    "It sent no Fisher. Use the same fedcompo version everywhere."
                )
            keep_fisher(name, answer.fisher)
        self._take_in(name, answer)
        who, about = self.participants, replace(answer, fisher=None)
        self.participants = replace(who, described={**who.described, name: about})
        return name

    def _take_in(self, name: str, answer: IdentifyAnswer) -> None:
        who = self.participants
        noised = who.noised | {name} if answer.noised else who.noised
        tests = {**who.tests, name: answer.num_test_examples}
        self.participants = replace(who, names=who.names | {name}, noised=noised, tests=tests)

    def _checked_name(self, client: str, answer: IdentifyAnswer, body: Body) -> str:
        """Return a client's name; refuse it if name or backbone are not what they must be."""
        name = check_client_name(answer.client)
        registered = self.exchange.nodes.registered_name(client)
        if registered and name != registered:
            raise ContributionError(
                f"The node registered as {registered!r} calls itself {name!r}; it must use the "
                "name under which it is registered."
            )
        if client in self.participants.names and name != client:
            raise ContributionError(f"Client {client!r} calls itself {name!r} now.")
        shard = self.exchange.nodes.shard(client)
        if check_whole(whole_of(name) if shard is not None else name) and shard_of(name) != shard:
            raise ContributionError(f"It calls itself {name!r}, and was asked as shard {shard}.")
        if name != client:
            self._refuse_twins(client, name)
        self.exchange.books.note(check_versions(name, Process.from_body(body).versions))
        check_backbone(name, answer.base, self.backbone)
        return name

    def _refuse_twins(self, client: str, name: str) -> None:
        """Refuse both of two nodes with one name: neither can be trusted to be that client.

        In a run that is under way, the one that took part stays. The other is asked again later: it
        may be the same client, back before its old node was found to be gone.
        """
        whole, ids = whole_of(name), self.exchange.nodes.ids
        reason = f"Two nodes call themselves {whole!r}; give each node a name of its own."
        own = [c for c in self.exchange.clients if ids[c] == ids[client]]
        rivals = [c for c in self.exchange.clients if whole_of(c) == whole and c not in own]
        if rivals and self._late:
            self.exchange.nodes.look_anew(client)
            raise ContributionError(reason)
        if rivals:
            who = self.participants
            self.participants = replace(
                who, ambiguous=who.ambiguous | {whole}, names=who.names - {*rivals}
            )
            for rival in rivals:
                self.leave_out(rival, reason)
        if whole in self.participants.ambiguous:
            raise ContributionError(reason)
        if other := [c for c in self.participants.names & {*own} if whole_of(c) != whole]:
            raise ContributionError(f"Its node calls itself {name!r}, and {other[0]!r} before.")

    def leave_out(self, name: str, reason: str) -> None:
        """Forget a client whose answer was folded in, and leave it out of the run."""
        self.forget([name])
        books = self.exchange.books
        phase = PHASE if books.label(PHASE) in books.traffic else NAMING
        cost = books.traffic[books.label(phase)].pop(name, NOTHING)
        self.exchange.leave_out(phase, name, reason, cost)
