"""A grid for Flower's own strategies that sends their messages through the exchange.

Each message is one packed record, within the settings' time and number of requests; every byte is
booked, and a client that fails is named. Flower's own grid does none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flwr.app import Message, RecordDict

from fedcompo.messages.body import Body
from fedcompo.messages.requests import ROUND
from server.exchange.exchange import Exchange

Read = Callable[[str, Body], RecordDict]
"""Takes a client's name and answer, checks it, returns the reply that the strategy expects."""


@dataclass
class ExchangeGrid:
    """The part of a ``flwr.serverapp.Grid`` that ``Strategy.start`` uses."""

    exchange: Exchange
    read: Read

    def get_node_ids(self) -> list[int]:
        """Nodes of the clients still in the run."""
        return [self.exchange.nodes.ids[client] for client in self.exchange.clients]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send the clients a round's messages and wait for their replies, as the exchange does.

        Each message has one record of arrays and one of settings.

        Returns:
            Usable replies, in the order of clients' names, so that sums do not depend on who was
            faster.

        Raises:
            TooFewClients: If fewer than ``min-clients`` are left.
        """
        to = {message.metadata.dst_node_id: message for message in messages}
        nodes = self.exchange.nodes.ids
        asked = {client: to[node] for client, node in nodes.items() if node in to}
        if not asked:
            return []
        replies: dict[str, Message] = {}

        def fold(client: str, body: Body) -> str:
            replies[client] = Message(self.read(client, body), reply_to=asked[client])
            return client

        _, settings = _body(next(iter(asked.values())))
        with self.exchange.books.during(f"round {settings[ROUND]}"):
            self.exchange.ask(
                "train", "train", lambda client: _body(asked[client]), fold, clients=asked
            )
        return [replies[client] for client in sorted(replies)]


def _body(message: Message) -> Body:
    """Arrays and settings of a strategy's message."""
    (arrays,) = message.content.array_records.values()
    (settings,) = message.content.config_records.values()
    return dict(arrays.to_torch_state_dict()), dict(settings)
