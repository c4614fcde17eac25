"""The grid of one process, in which nodes can be renamed, restart, and lose their replies."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping

from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo

from fedcompo.engine import in_process

Tamper = Callable[[Message], Message | None]
"""Changes a client's reply; None: it never arrives."""


class InProcessGrid(in_process.InProcessGrid):
    """Hands each message to the ClientApp at once, and its reply through what a test does to it.

    Args:
        client_app: The real ClientApp.
        run_config: Flat settings, as the apps get them.
        clients: Number of nodes; node i gets ``partition-id`` i.
        node_configs: Further node config by partition.
        names: Registered names by partition.
        tamper: Changes replies, by partition and message type.
        present: Whether a partition's node is connected; asked at each look.
        node_of: Id of a partition's node; a node that restarts has another one.
    """

    in_flight = 0

    def __init__(
        self,
        client_app: ClientApp,
        run_config: Mapping[str, bool | int | float | str],
        clients: int,
        *,
        node_configs: Mapping[int, Mapping[str, str]] | None = None,
        names: Mapping[int, str] | None = None,
        tamper: Mapping[tuple[int, str], Tamper] | None = None,
        present: Callable[[int], bool] = lambda partition: True,
        node_of: Callable[[int], int] = lambda partition: in_process.FIRST_NODE + partition,
    ) -> None:
        super().__init__(client_app, run_config, clients)
        for partition, settings in (node_configs or {}).items():
            self.contexts[partition].node_config.update(settings)
        self._names, self._tamper = names or {}, tamper or {}
        self._present, self._node_of = present, node_of
        self.largest_backlog = 0
        """Most replies that ever waited to be pulled."""

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(node_id=self._node_of(i), name=self._names.get(i, ""), status="online")
            for i in range(len(self.contexts))
            if self._present(i)
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = super().push_messages(messages)
        self.largest_backlog = max(self.largest_backlog, len(self.replies))
        return ids

    def partition_of(self, node: int) -> int | None:
        return next((i for i in range(len(self.contexts)) if self._node_of(i) == node), None)

    def answer(self, message: Message, partition: int) -> Message | None:
        reply = super().answer(copy.deepcopy(message), partition)
        change = self._tamper.get((partition, message.metadata.message_type))
        return reply if change is None else change(reply)


def late(seconds: float) -> Tamper:
    """A reply that keeps the run waiting, and arrives."""

    def wait(reply: Message) -> Message:
        time.sleep(seconds)
        return reply

    return wait


def lost(reply: Message) -> None:
    """A reply that never arrives."""
