"""The sum of the clients' last task vectors, and the heads and lineages that belong to them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fedcompo.composition.running_sum import RunningSum
from fedcompo.config.choices import Method
from fedcompo.messages.requests import own_tensors
from fedcompo.method.heads import Head
from fedcompo.method.lineage import Lineage
from fedcompo.method.task_vector import TaskVector
from fedcompo.registry.registry import Registry
from server.phases.fitting import Fitting
from server.phases.roster import Roster
from server.rounds.holdings import LastSent

ALONE = Lineage(method=str(Method.IEL))
"""Lineage of a client before its first round."""


@dataclass
class CurrentSum:
    """What is in the sum at the moment; task vectors are read from disk."""

    fitting: Fitting
    last: LastSent
    """The clients' last task vectors."""
    heads: dict[str, Head] = field(default_factory=dict)
    """Last head, by client."""
    lineages: dict[str, Lineage] = field(default_factory=dict)
    """Lineage over all rounds, by client."""
    _trained: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Begin with an empty sum."""
        self.registry: Registry = self.fitting.registry
        self.roster: Roster = self.fitting.roster
        self.running = RunningSum(self.fitting.backbone.theta_0)

    @property
    def clients(self) -> tuple[str, ...]:
        """Clients whose task vectors are in the sum, sorted."""
        return self.running.clients

    @property
    def trained(self) -> tuple[str, ...]:
        """Those of them that trained in this run, sorted."""
        return tuple(sorted(self._trained))

    def begin(self, members: Collection[str], going_on: Collection[str]) -> None:
        """Put members of the registry into the sum: those that stay as they are, or train on."""
        for client in (*members, *going_on):
            contribution = self.registry.contribution(client)
            times = self.fitting.settings.times(contribution.num_examples)
            self.running.put(client, contribution.task_vector, times=times)
            if client in going_on:
                self.heads[client] = contribution.head
                self.lineages[client] = ALONE.joined(contribution.lineage)

    # -- what a client trains inside --------------------------------------------------------------

    def times(self, client: str) -> int:
        """How often a client counts in the sum."""
        described = self.roster.participants.described[client]
        return self.fitting.settings.times(described.num_examples)

    def together(self, asked: Iterable[str]) -> int:
        """How often all clients count that are in the sum, or are asked to train."""
        return sum((self.running.times | {client: self.times(client) for client in asked}).values())

    def own(self, client: str) -> dict[str, Tensor]:
        """A client's last task vector and head, as a message has them."""
        own = self.running.vectors[client].tensors
        return own_tensors({name: own[name] for name in own}, self.heads[client])

    # -- what it becomes --------------------------------------------------------------------------

    def put(self, client: str, inside: Iterable[str]) -> None:
        """Let a client's new task vector take the place of its last one, in the sum and on disk.

        Args:
            client: The client; :class:`LastSent` holds its new task vector.
            inside: Clients whose task vectors were in the sum that it trained in.

        Raises:
            ContributionError: If it cannot be summed; nothing has changed then.
        """
        vector, _ = self._read(client, arriving=True)
        self.running.put(client, vector, times=self.times(client))
        self.last.take(client)
        self.running.vectors[client], self.heads[client] = self._read(client)
        self._trained.add(client)
        before, lineage = self.lineages.get(client, ALONE), self.fitting.lineage(client)
        self.lineages[client] = before.joined(lineage, ensemble={*inside} - {client})

    def drop(self, client: str) -> None:
        """Take a client out of the sum, exactly, if it is in it."""
        if client in self.clients:
            self.running.drop(client)
            self.last.forget(client)
            self._trained.discard(client)

    def keep(self) -> list[Path]:
        """Write the contributions of all that trained; returns their folders."""
        for client in self.trained:
            vector, head = self.running.vectors[client], self.heads[client]
            lineage = self.lineages[client]
            self.fitting.keep(self.fitting.contribution(client, vector, head, lineage))
        return [self.fitting.folder(client) for client in self.trained]

    def _read(self, client: str, *, arriving: bool = False) -> tuple[TaskVector, Head]:
        who, base = self.roster.participants, self.fitting.backbone.fingerprint
        kind, classes = who.kinds[client], who.described[client].classes
        return self.last.read(client, kind, base, classes, arriving=arriving)
