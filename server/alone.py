"""One newcomer's contribution without Flower: the server's part, in the process of the client.

Who is there, the joint head, the Fisher that anchors, every request and every check of an answer
are those of a run. Requests and answers pass through the records of a run too, so the same numbers
are rounded in the same way. Only nothing is sent, and nothing is added to the registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from flwr.app import RecordDict

from fedcompo.config.run import RunConfig
from fedcompo.messages.body import Body
from fedcompo.messages.records import from_record, to_record
from fedcompo.messages.requests import addressed
from fedcompo.registry.registry import Registry
from server.exchange.books import Books
from server.exchange.checks import checked_caps
from server.exchange.exchange import Exchange, Fold
from server.exchange.nodes import Nodes
from server.resume import Working
from server.strategy import ItaStrategy

Answering = Callable[[str, RecordDict], RecordDict]
"""Takes the type of a message and the request; raises what the client raises."""


@dataclass
class AtHand(Exchange):
    """The conversation with a single client that is at hand; its errors are raised as they are."""

    answering: Answering = field(kw_only=True)

    def ask(
        self,
        phase: str,
        message_type: str,
        request: Callable[[str], Body],
        fold: Fold,
        *,
        clients: Iterable[str] | None = None,
        **how: bool,
    ) -> None:
        """Let the client answer at once, and fold its answer in; see :meth:`Exchange.ask`."""
        self.books.traffic.setdefault(self.books.label(phase), {})
        expected = message_type.rpartition(".")[2]
        for client in self.clients if clients is None else tuple(clients):
            shard = self.nodes.shard(client)
            asked = to_record(*addressed(request(client), "", self.preprocessing, shard))
            reply = self.answering(message_type, asked)
            body = from_record(reply, expected=expected, source=f"client {client!r}")
            checked_caps(client, body)
            fold(client, body)


def contribute(
    registry: Registry, config: RunConfig, client: str, answering: Answering, scratch: Path
) -> tuple[Path, dict[str, Any]]:
    """Let one client describe itself and train, as a newcomer to a registry does.

    Args:
        registry: Is only read; its members are the others.
        config: The settings of a run.
        client: The newcomer's name.
        answering: The client.
        scratch: Folder for working files.

    Returns:
        The folder of the contribution, inside ``scratch``, and what to tell of it, as JSON values.
    """
    backbone = registry.backbone.load()
    own = Nodes(cast(Any, None), {client: 1}, shards=config.data.shards)
    exchange = AtHand(
        *(Books(scratch / "events"), own, config.server.timeout, 1),
        preprocessing=backbone.preprocessing,
        answering=answering,
    )
    working = Working(scratch, config.flat(), registry.clients)
    strategy = ItaStrategy(exchange, config, backbone, registry, working)
    (folder,) = strategy.fit()
    strategy.fitting.remark([client])
    described = strategy.roster.participants.described[client]
    return folder, {
        "client": client,
        "kind": strategy.roster.participants.kinds[client],
        "classes": described.classes,
        "num_examples": described.num_examples,
        "num_test_examples": described.num_test_examples,
        "own_task_accuracy": strategy.figures[client]["own_task_accuracy"],
        "others": registry.clients,
        "notes": exchange.books.notes,
    }
