"""What Flower's own strategies see of the clients: those still in the run, asked by the exchange.

A strategy wants node ids of a grid, and replies to its messages. Flower's grid would send its many
small arrays one by one, name nobody who fails, and count no bytes. Here its messages travel as all
others do: packed, within the time and the number of requests that the settings allow, and booked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flwr.app import Message, RecordDict

from fedcompo.messages.records import Body
from server.exchange.exchange import Exchange

Read = Callable[[str, Body], RecordDict]
"""Takes a client's name and answer; checks it; returns what the strategy expects as a reply."""


@dataclass
class ExchangeGrid:
    """As much of a ``flwr.serverapp.Grid`` as ``Strategy.start`` uses."""

    exchange: Exchange
    read: Read

    def get_node_ids(self) -> list[int]:
        """Nodes of the clients still in the run; whoever was left out is not asked again."""
        return [self.exchange.nodes[client] for client in self.exchange.clients]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send clients a round's messages, and wait for their replies.

        Args:
            messages: Each with one record of arrays and one of settings.
            timeout: Not used; the exchange has its own.

        Returns:
            Usable replies, in the order of clients' names: sums then do not depend on who was
            faster.

        Raises:
            TooFewClients: If fewer than ``min-clients`` are left.
        """
        to = {message.metadata.dst_node_id: message for message in messages}
        nodes = {client: self.exchange.nodes[client] for client in self.exchange.clients}
        asked = {client: to[node] for client, node in nodes.items() if node in to}
        if not asked:
            return []
        replies: dict[str, Message] = {}

        def fold(client: str, body: Body) -> str:
            replies[client] = Message(self.read(client, body), reply_to=asked[client])
            return client

        _, settings = _body(next(iter(asked.values())))
        self.exchange.part = f"round {settings['server-round']}"
        self.exchange.ask(
            "train", "train", lambda client: _body(asked[client]), fold, clients=asked
        )
        self.exchange.part = ""
        return [replies[client] for client in sorted(replies)]


def _body(message: Message) -> Body:
    """Arrays and settings of a strategy's message."""
    (arrays,) = message.content.array_records.values()
    (settings,) = message.content.config_records.values()
    return dict(arrays.to_torch_state_dict()), dict(settings)
