"""A Grid without sockets: the real apps, in this process, one message after the other."""

from __future__ import annotations

import copy
import time
import uuid
from collections.abc import Callable, Iterable, Mapping

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

Tamper = Callable[[Message], Message | None]
"""Changes a client's reply; None: it never arrives."""


class InProcessGrid(Grid):
    """Hands each message to the ClientApp at once and keeps the reply until it is asked for.

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
        node_of: Callable[[int], int] = lambda partition: 1000 + partition,
    ) -> None:
        # A Message outside a Flower process needs an identity to be made at all.
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self._app, self._names, self._tamper = client_app, names or {}, tamper or {}
        self._contexts = {
            i: Context(
                run_id=1,
                node_id=1000 + i,
                node_config={
                    "partition-id": i,
                    "num-partitions": clients,
                    **(node_configs or {}).get(i, {}),
                },
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for i in range(clients)
        }
        self._present, self._node_of = present, node_of
        self._replies: dict[str, Message] = {}
        self.largest_backlog = 0
        """Most replies that ever waited to be pulled."""

    def set_run(self, run: object) -> None: ...

    @property
    def run(self) -> None:
        return None

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(node_id=self._node_of(i), name=self._names.get(i, ""), status="online")
            for i in self._contexts
            if self._present(i)
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message_id = str(uuid.uuid4())
            message.metadata.__dict__["_message_id"] = message_id
            reply = self._answer(message)
            if reply is not None:
                self._replies[message_id] = reply
            self.largest_backlog = max(self.largest_backlog, len(self._replies))
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        partition = next((i for i in self._contexts if self._node_of(i) == node), None)
        if partition is None:  # a node that is no more
            return None
        request = copy.deepcopy(message)
        request.metadata.__dict__["_src_node_id"] = 1
        try:
            reply = self._app(request, self._contexts[partition])
        except Exception as error:  # as Flower does: whatever is raised becomes an error reply
            reply = Message(Error(code=2, reason=repr(error)), reply_to=request)
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
