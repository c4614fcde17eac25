"""Which nodes are connected, and which client each of them is."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from logging import INFO
from typing import Any

from flwr.common.logger import log
from flwr.serverapp import Grid

from fedcompo.errors import TooFewClients
from server.exchange.books import Books

SETTLED = 3.0
"""Seconds without a new node after which all are there, where nobody says how many there are."""


@dataclass
class Nodes(Books):
    """Finds the clients of a run."""

    grid: Grid
    timeout: float
    min_clients: int
    nodes: dict[str, int] = field(default_factory=dict)
    """Flower's node id by client name; those left out are gone."""
    registered: dict[int, str] = field(default_factory=dict)
    """Names under which the SuperLink knows nodes, by node id."""
    _seen: set[int] = field(default_factory=set)
    """Ids of all nodes that ever were taken up."""

    @property
    def clients(self) -> tuple[str, ...]:
        """Names of the clients still in the run, sorted."""
        return tuple(sorted(self.nodes))

    def gather(self, wanted: int) -> None:
        """Wait for clients to connect.

        Args:
            wanted: Number of clients; 0: all that are there once nobody new comes for 3 seconds.

        Raises:
            TooFewClients: If fewer than ``min_clients`` come in time.
        """
        started, last_change, known = time.monotonic(), time.monotonic(), -1
        while True:
            nodes = list(self.grid.get_nodes())
            now = time.monotonic()
            if len(nodes) != known:
                known, last_change = len(nodes), now
                if known < (least := max(wanted, self.min_clients)):
                    text = "%d of %d client(s) are connected; waiting at most %g s for the others"
                    log(INFO, text, known, least, self.timeout)
            settled = not wanted and known >= self.min_clients and now - last_change > SETTLED
            if settled or (wanted and known >= wanted):
                break
            if now - started > self.timeout and known >= self.min_clients:
                text = f"{known} of {wanted} client(s) connected within {self.timeout:g} s."
                self.note(text)
                break
            if now - started > self.timeout:
                raise TooFewClients(
                    f"{known} client(s) connected within {self.timeout:g} s, expected at least "
                    f"{self.min_clients} (`min-clients`). Start more clients, or raise `timeout`."
                )
            time.sleep(0.5)
        self.nodes = {}
        self._take_up(nodes)

    def look_again(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """See who has come and who has gone since the last look.

        Returns:
            Provisional names of the nodes that are new, and names of the clients whose node is no
            longer there; these have lost their node, and may come back, under its id or another.
        """
        nodes = list(self.grid.get_nodes())
        there = {node.node_id for node in nodes}
        gone = tuple(client for client in self.clients if self.nodes[client] not in there)
        for client in gone:  # also under the same id, if it was but out of reach
            self._seen.discard(self.nodes.pop(client))
        return self._take_up([node for node in nodes if node.node_id not in self._seen]), gone

    def look_anew(self, client: str) -> None:
        """Let a client's node count as new at the next look, whatever becomes of it now."""
        self._seen.discard(self.nodes[client])

    def _take_up(self, nodes: list[Any]) -> tuple[str, ...]:
        """Give new nodes provisional names."""
        self._seen |= {node.node_id for node in nodes}
        self.registered |= {node.node_id: node.name for node in nodes if node.name}
        new = {self._called(node.node_id): node.node_id for node in nodes}
        self.nodes |= new
        return tuple(sorted(new))

    def _called(self, node: int) -> str:
        """What a client is called until it has said who it is."""
        name = self.registered.get(node)
        return f"node {node}, registered as {name}" if name else f"node {node}"
