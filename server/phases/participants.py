"""Who takes part in a run, as one frozen value."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from fedcompo.config.choices import Kind
from fedcompo.messages.answers import DescribeAnswer


@dataclass(frozen=True)
class Participants:
    """Who takes part in a run. The value is replaced when a client comes or goes."""

    members: tuple[str, ...] = ()
    """Members of the registry that nobody trains again."""
    asked: tuple[str, ...] | None = None
    """Whose turn it is; None: everyone who is connected."""
    names: frozenset[str] = frozenset()
    """All clients that said who they are, described or not."""
    tests: Mapping[str, int] = field(default_factory=dict)
    """Their test images."""
    noised: frozenset[str] = frozenset()
    """Those of them whose statistics are under noise."""
    ambiguous: frozenset[str] = frozenset()
    """Names that several nodes claimed."""
    described: Mapping[str, DescribeAnswer] = field(default_factory=dict)
    """Descriptions by name, without Fisher; also of clients that were left out later."""
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    """Kind of task vector, by client."""
    absent: frozenset[str] = frozenset()
    """Clients that take part, but are not connected at the moment."""

    def newcomers(self, connected: Iterable[str]) -> tuple[str, ...]:
        """Those of the connected clients that are to be trained."""
        asked = self.asked
        return tuple(
            c for c in connected if c not in self.members and (asked is None or c in asked)
        )

    def with_kinds(self, kinds: tuple[Kind, ...]) -> Participants:
        """Deal kinds in turn, in the order of names, to described clients that have none.

        A client that insists on a kind gets that one.
        """
        dealt = {
            client: self.described[client].kind or kinds[index % len(kinds)]
            for index, client in enumerate(sorted(self.names))
            if client in self.described
        }
        return replace(self, kinds=dealt | dict(self.kinds))

    def without(self, clients: Collection[str]) -> Participants:
        """Forget the descriptions of clients."""
        described = {c: about for c, about in self.described.items() if c not in clients}
        return replace(self, described=described, absent=self.absent - set(clients))
