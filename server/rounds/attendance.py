"""Decide who takes part in which round: clients come, go, lose their node, and come back.

A client joins when its node appears, or in the round that ``joins`` names. It leaves after the
round that ``leaves`` names; what is said of a client is said of all its shards. A client whose node
is gone is absent: its last task vector stays in the sum, and it trains again when a node of its
name is back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedcompo.config.choices import rounds_of
from fedcompo.config.server import ServerConfig
from fedcompo.config.setting import names_of
from fedcompo.data.tasks import members_of, whole_of
from server.exchange.exchange import Exchange
from server.phases.fitting import Fitting
from server.phases.roster import Roster


@dataclass
class Attendance:
    """Decides, round by round, who takes part."""

    fitting: Fitting
    rounds: int
    """How many there are."""
    closed: Collection[str] | None = None
    """Only these clients take part; None: all that come, as ``joins`` and ``leaves`` say."""
    past: Sequence[Mapping[str, Any]] = ()
    """Rounds that were over when the run was interrupted, as in ``Rounds.history``. They are
    repeated with the clients that took part then."""

    def __post_init__(self) -> None:
        """Read which clients are to come and go."""
        self.exchange: Exchange = self.fitting.exchange
        self.roster: Roster = self.fitting.roster
        server = self.fitting.config.server if self.closed is None else ServerConfig()
        self.joins, self.leaves = rounds_of(server.joins), rounds_of(server.leaves)
        self.excluded = names_of(server.exclude)

    def welcome(self, number: int) -> tuple[str, ...]:
        """Note who came or went since the round before; returns the clients that join this one."""
        if number > 1:
            self.roster.look_again()
        self._turn_away(number)
        who = self.roster.participants
        clients = set(self.exchange.clients)
        waiting = {client for client in clients if self._first(client) > number}
        here = clients - waiting - set(who.members)
        new = sorted(here - who.described.keys())
        return self.fitting.take_in(new, decisive=number == 1) if new else ()

    def asked(self, number: int) -> tuple[str, ...]:
        """Clients to train in a round, sorted; in a repeated one, those that trained then."""
        if number > len(self.past):
            return self.roster.present
        trained = set(self.past[number - 1]["trained"])
        present = self.roster.present
        return tuple(client for client in present if client in trained) or present

    def missed(self, number: int) -> tuple[str, ...]:
        """Clients that missed a round which is repeated."""
        return tuple(self.past[number - 1]["missed"]) if number <= len(self.past) else ()

    def _first(self, client: str) -> int:
        """The round in which a client joins."""
        came = [number for number, past in enumerate(self.past, 1) if client in past["came"]]
        return came[0] if came else max(_of(self.joins, client) or 1, len(self.past) + 1)

    def leaving(self, number: int) -> tuple[str, ...]:
        """Clients that leave after a round."""
        known = self.roster.participants.names - set(self.roster.participants.members)
        return tuple(c for c in sorted(known) if _of(self.leaves, c) == number)

    def close(self) -> None:
        """Note every entry of ``joins`` and ``leaves`` that had no effect."""
        who = self.roster.participants
        for setting, rounds in (("joins", self.joins), ("leaves", self.leaves)):
            for client, number in sorted(rounds.items()):
                if client in who.members:
                    text = "it is a member of the registry: nobody joins or leaves that in rounds"
                elif not members_of(client, who.names):
                    text = "it never came"
                elif number > self.rounds:
                    text = f"there are {self.rounds} round(s)"
                else:
                    continue
                self.exchange.books.note(f"`{setting}` names {client}:{number}, but {text}.")

    def _turn_away(self, number: int) -> None:
        """Leave out connected clients that are not to take part."""
        members = self.roster.participants.members
        for client in self.exchange.clients:
            last = _of(self.leaves, client)
            if {client, whole_of(client)} & {*self.excluded}:
                reason = "excluded by `exclude`"
            elif last and last < number and client not in members:
                reason = f"it left after round {last}"
            elif self.closed is not None and client not in self.closed:
                reason = "it was not there, or not a member of the registry, at the beginning"
            else:
                continue
            self.exchange.leave_out("identify", client, reason)


def _of(rounds: Mapping[str, int], client: str) -> int | None:
    """The round that is named for a client, or for what it is a shard of."""
    return rounds.get(client, rounds.get(whole_of(client)))
