"""A client without Flower: answers the requests of a newcomer's run in the same process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import RecordDict

from clients.app import answered
from clients.local import LocalClient
from fedcompo.backbone.backbone import Backbone
from fedcompo.messages.answers import Answer
from fedcompo.messages.body import Body
from fedcompo.messages.records import from_record
from fedcompo.messages.requests import REQUEST, DescribeRequest, FisherRequest, TrainRequest

Answering = Callable[[str, RecordDict], RecordDict]

WORK: Mapping[str, Callable[[LocalClient, Body], Answer]] = {
    "identify": lambda client, body: client.identify(),
    "describe": lambda client, body: client.describe(DescribeRequest.from_body(body)),
    "fisher": lambda client, body: client.fisher(FisherRequest.from_body(body)),
    "train": lambda client, body: client.train(TrainRequest.from_body(body)),
}
"""What a client does while it fits its contribution, by what is asked for."""


def client_of(
    run_config: Mapping[str, Any], data: str, name: str, backbone: Backbone
) -> tuple[LocalClient, Answering]:
    """Build the client of a folder on a backbone in memory, and what answers for it.

    The answering raises what the client raises.

    Raises:
        FedcompoError: If settings or images cannot be used.
    """
    client = LocalClient.from_node(run_config, {"data": data, "client": name}, backbone=backbone)

    def answer(asked: str, content: RecordDict) -> RecordDict:
        body = from_record(content, expected=REQUEST, source="the server")
        return answered(lambda: WORK[asked](client, body))

    return client, answer
