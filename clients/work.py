"""Reads each request, lets the local client do the work, makes the answer."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from flwr.app import Context, Message, RecordDict

from clients import averaging, composed, gate
from clients.loading import known_name
from clients.local import LocalClient
from fedcompo.data.tasks import shard_name
from fedcompo.messages.answers import Answer, Process
from fedcompo.messages.body import Body
from fedcompo.messages.records import from_record, to_record
from fedcompo.messages.requests import (
    REQUEST,
    ROUND,
    AveragingRequest,
    DescribeRequest,
    EvaluateRequest,
    FisherRequest,
    NoticeRequest,
    RealignRequest,
    TrainRequest,
    VoteRequest,
    preprocessing_of,
    registered_name,
    shard_in,
)
from fedcompo.runtime import installed_versions, memory_kept, peak_bytes, reset_peak

Work = Callable[[LocalClient, Body], Answer]


def _trained(client: LocalClient, body: Body) -> Answer:
    """Fit the task vector, or train the model that all share (FedAvg, FedProx)."""
    if ROUND in body[1]:
        return averaging.train(client, AveragingRequest.from_body(body))
    return client.train(TrainRequest.from_body(body))


WORK: dict[str, Work] = {
    "train": _trained,
    "query.identify": lambda client, body: client.identify(),
    "query.describe": lambda client, body: client.describe(DescribeRequest.from_body(body)),
    "query.fisher": lambda client, body: client.fisher(FisherRequest.from_body(body)),
    "query.notice": lambda client, body: client.notice(NoticeRequest.from_body(body)),
    "query.realign": lambda client, body: composed.realign(client, RealignRequest.from_body(body)),
    "query.vote": lambda client, body: composed.vote(client, VoteRequest.from_body(body)),
    "evaluate": lambda client, body: composed.evaluate(client, EvaluateRequest.from_body(body)),
}
"""What a client does, by Flower's type of the message that asks for it."""


def answer(asked: str, message: Message, context: Context) -> Message:
    """Do the work that is asked for, and let through the gate what may leave."""
    run_config, node_config = context.run_config, context.node_config
    name, shard = known_name(run_config, node_config), None
    fault: Exception | None = None
    try:
        body = from_record(message.content, expected=REQUEST, source="the server")
        shard = shard_in(body)
    except Exception as error:  # raised below, where errors leave
        fault = error

    def made() -> Answer:
        if fault:
            raise fault
        client = LocalClient.from_node(
            run_config,
            node_config,
            registered_name(body),
            preprocessing_of(body),
            shard=shard,
        )
        return WORK[asked](client, body)

    name = name and shard_name(name, shard)
    phase = asked.rpartition(".")[2]
    return Message(gate.answer_of(lambda: answered(made), name, phase), reply_to=message)


def answered(make: Callable[[], Answer]) -> RecordDict:
    """Let a client make its answer; return it as it travels, with facts on the process."""
    # The same seed gives the same result, also on a GPU, where torch knows such an algorithm.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    reset_peak()
    with memory_kept():
        tensors, manifest = make().to_body()
    process = Process(peak_memory=peak_bytes(), versions=installed_versions())
    return to_record(tensors, manifest | process.to_body()[1])


def answering(client: LocalClient) -> Callable[[str, RecordDict], RecordDict]:
    """Return what answers messages, by type and content, without Flower; it raises what is raised.

    For a client that is fitted alone; see :mod:`fedcompo.engine.alone`.
    """

    def answer(asked: str, content: RecordDict) -> RecordDict:
        body = from_record(content, expected=REQUEST, source="the server")
        return answered(lambda: WORK[asked](client, body))

    return answer
