"""Who is there in which round: clients that come, go, lose their node, and come back.

A client joins when its node appears, or in the round that ``joins`` names; it leaves after the
round that ``leaves`` names. One whose node is gone is absent: it still takes part, with what it
sent last, and trains again once a node of its name is back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedcompo.config.choices import rounds_of
from fedcompo.config.server import ServerConfig
from fedcompo.config.setting import names_of
from server.exchange.exchange import Exchange
from server.phases.fitting import Fitting


@dataclass
class Attendance:
    """Sees, from round to round, who takes part in what a :class:`Fitting` knows of."""

    fitting: Fitting
    rounds: int
    """How many there are."""
    closed: Collection[str] | None = None
    """Nobody but these takes part; None: whoever comes, as the settings have it."""
    past: Sequence[Mapping[str, Any]] = ()
    """Rounds that were over when the run was interrupted, as in ``Rounds.history``.
    They are gone through again with those who were there."""

    def __post_init__(self) -> None:
        """Read who is to come and go."""
        self.exchange: Exchange = self.fitting.exchange
        server = self.fitting.config.server if self.closed is None else ServerConfig()
        self.joins, self.leaves = rounds_of(server.joins), rounds_of(server.leaves)
        self.excluded = names_of(server.exclude)

    @property
    def present(self) -> tuple[str, ...]:
        """Connected clients whose turn has come, sorted."""
        return tuple(c for c in self.fitting.newcomers if c in self.fitting.roster.described)

    def welcome(self, number: int) -> tuple[str, ...]:
        """Take note of who has come or gone since the round before; describe who is new.

        Args:
            number: Of the round that begins.

        Returns:
            Who takes part from now on.
        """
        fitting, described = self.fitting, self.fitting.roster.described
        if number > 1:
            nodes, gone = self.exchange.look_again()
            fitting.absent |= set(gone) & described.keys()
            if nodes:
                fitting.roster.identify(nodes)
            fitting.absent -= set(self.exchange.clients)
        self._turn_away(number)
        clients = set(self.exchange.clients)
        waiting = {client for client in clients if self._first(client) > number}
        here = clients - waiting - set(fitting.members)
        new = sorted(here - described.keys())
        return fitting.take_in(new, decisive=number == 1) if new else ()

    def asked(self, number: int) -> tuple[str, ...]:
        """Who is to train in a round, sorted: in one that was over already, who trained then."""
        if number > len(self.past):
            return self.present
        trained = set(self.past[number - 1]["trained"])
        return tuple(client for client in self.present if client in trained) or self.present

    def missed(self, number: int) -> tuple[str, ...]:
        """Who missed a round that was over already."""
        return tuple(self.past[number - 1]["missed"]) if number <= len(self.past) else ()

    def _first(self, client: str) -> int:
        """The round that a client joins in."""
        came = [number for number, past in enumerate(self.past, 1) if client in past["came"]]
        return came[0] if came else max(self.joins.get(client, 1), len(self.past) + 1)

    def leaving(self, number: int) -> tuple[str, ...]:
        """Who leaves after a round."""
        known = self.fitting.roster.names - set(self.fitting.members)
        return tuple(c for c, last in sorted(self.leaves.items()) if last == number and c in known)

    def close(self) -> None:
        """Say what did not come about of what the settings ask for."""
        known, members = self.fitting.roster.names, self.fitting.members
        for setting, rounds in (("joins", self.joins), ("leaves", self.leaves)):
            for client, number in sorted(rounds.items()):
                if client in members:
                    text = "it is a member of the registry: nobody joins or leaves that in rounds"
                elif client not in known:
                    text = "it never came"
                elif number > self.rounds:
                    text = f"there are {self.rounds} round(s)"
                else:
                    continue
                self.exchange.note(f"`{setting}` names {client}:{number}, but {text}.")

    def _turn_away(self, number: int) -> None:
        """Leave out who comes, but is not to take part."""
        for client in self.exchange.clients:
            if client in self.excluded:
                reason = "excluded by `exclude`"
            elif self.leaves.get(client, number) < number and client not in self.fitting.members:
                reason = f"it left after round {self.leaves[client]}"
            elif self.closed is not None and client not in self.closed:
                reason = "it was not there, or not a member of the registry, at the beginning"
            else:
                continue
            self.exchange.leave_out("identify", client, reason)
