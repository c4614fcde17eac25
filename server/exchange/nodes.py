"""Nodes that are connected, and the client that each of them is.

Where clients have shards (:mod:`fedcompo.data.tasks`), a node is several clients, one for each
shard. Each is asked, answers and can fail by itself.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from logging import INFO
from typing import Any

from flwr.common.logger import log
from flwr.serverapp import Grid

from fedcompo.data.tasks import shard_name, shard_of
from fedcompo.errors import TooFewClients

SETTLED = 3.0
"""Seconds without a new node after which a run starts, where the number of clients is not set."""


@dataclass
class Nodes:
    """Finds the clients of a run among the nodes of a grid."""

    grid: Grid
    ids: dict[str, int] = field(default_factory=dict)
    """Flower's node id by client; those left out are gone."""
    registered: dict[int, str] = field(default_factory=dict)
    """Names under which the SuperLink knows nodes, by node id."""
    shards: int = 1
    """Clients that each node is; 1: itself, whole."""
    _seen: set[int] = field(default_factory=set)
    """Ids of all nodes that have had a name."""

    @property
    def clients(self) -> tuple[str, ...]:
        """Names of the clients still in the run, sorted."""
        return tuple(sorted(self.ids))

    def node_name(self, client: str) -> str:
        """Name under which the SuperLink knows a client's node; empty if it knows none."""
        return self.registered.get(self.ids[client], "")

    def registered_name(self, client: str) -> str:
        """Name that a client must have, by that of its node; empty if that has none."""
        name = self.node_name(client)
        return name and shard_name(name, self.shard(client))

    def shard(self, client: str) -> int | None:
        """Number of a client's shard; None: it is whole. Provisional names say it too."""
        return shard_of(client) if self.shards > 1 else None

    def rename(self, client: str, name: str) -> None:
        """Call a client by the name that it gave itself."""
        self.ids[name] = self.ids.pop(client)

    def drop(self, client: str) -> None:
        """Take a client out of all that follows."""
        del self.ids[client]

    def gather(self, wanted: int, *, least: int, timeout: float) -> int:
        """Wait for clients to connect.

        Args:
            wanted: Number of clients; 0: all that are there once nobody new comes for 3 seconds.
            least: Number of clients without which there is no run.
            timeout: Seconds.

        Returns:
            How many are connected.

        Raises:
            TooFewClients: If fewer than the least come in time.
        """
        started, last_change, known = time.monotonic(), time.monotonic(), -1
        while True:
            nodes = list(self.grid.get_nodes())
            now = time.monotonic()
            if len(nodes) != known:
                known, last_change = len(nodes), now
                if known < max(wanted, least):
                    text = "%d of %d client(s) are connected; waiting at most %g s for the others"
                    log(INFO, text, known, max(wanted, least), timeout)
            enough, late = known >= least, now - started > timeout
            settled = not wanted and enough and now - last_change > SETTLED
            if settled or (wanted and known >= wanted) or (late and enough):
                break
            if late:
                raise TooFewClients(
                    f"{known} client(s) connected within {timeout:g} s, expected at least "
                    f"{least} (`min-clients`). Start more clients, or raise `timeout`."
                )
            time.sleep(0.5)
        self.ids = {}
        self._take_up(nodes)
        return known

    def look_again(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Find nodes that appeared or disappeared since the last look.

        Returns:
            Provisional names of new nodes, and names of clients whose node is gone. Such a client
            may come back, under the same node id or another.
        """
        nodes = list(self.grid.get_nodes())
        there = {node.node_id for node in nodes}
        gone = tuple(client for client in self.clients if self.ids[client] not in there)
        for client in gone:  # it may come back under the same id
            self._seen.discard(self.ids.pop(client))
        return self._take_up([node for node in nodes if node.node_id not in self._seen]), gone

    def look_anew(self, client: str) -> None:
        """Let a client's node count as new at the next look."""
        self._seen.discard(self.ids[client])

    def _take_up(self, nodes: list[Any]) -> tuple[str, ...]:
        """Give new nodes provisional names; returns these, sorted."""
        self._seen |= {node.node_id for node in nodes}
        self.registered |= {node.node_id: node.name for node in nodes if node.name}
        numbers = range(self.shards) if self.shards > 1 else (None,)
        new = {
            shard_name(self._called(node.node_id), number): node.node_id
            for node in nodes
            for number in numbers
        }
        self.ids |= new
        return tuple(sorted(new))

    def _called(self, node: int) -> str:
        """Provisional name of a client that has not said who it is."""
        name = self.registered.get(node)
        return f"node {node}, registered as {name}" if name else f"node {node}"
