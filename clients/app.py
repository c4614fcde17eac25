"""The ClientApp: reads each request, lets the local client do the work, sends the answer."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients import averaging, composed, gate
from clients.loading import known_name
from clients.local import LocalClient
from fedcompo.messages.answers import Answer, Process
from fedcompo.messages.body import Body, Content
from fedcompo.messages.records import from_record, to_record
from fedcompo.messages.requests import (
    REQUEST,
    ROUND,
    AveragingRequest,
    DescribeRequest,
    EvaluateRequest,
    FisherRequest,
    IdentifyRequest,
    NoticeRequest,
    RealignRequest,
    TrainRequest,
    VoteRequest,
    preprocessing_of,
    registered_name,
)
from fedcompo.runtime import installed_versions, peak_bytes, reset_peak

app = ClientApp()

Asked = TypeVar("Asked", bound=Content)
Work = Callable[[LocalClient, Body], Answer]


@app.train()
def train(message: Message, context: Context) -> Message:
    """Fit the task vector, or train the model that all share (FedAvg, FedProx)."""

    def work(client: LocalClient, body: Body) -> Answer:
        if ROUND in body[1]:
            return averaging.train(client, AveragingRequest.from_body(body))
        return client.train(TrainRequest.from_body(body))

    return _answer(message, context, work)


def _on(
    request: type[Asked], work: Callable[[LocalClient, Asked], Answer]
) -> Callable[[Message, Context], Message]:
    """Read a request of one sort from each message, and answer it by this work."""
    return lambda message, context: _answer(
        message, context, lambda client, body: work(client, request.from_body(body))
    )


def _answer(message: Message, context: Context, work: Work) -> Message:
    """Do the work, and let through the gate what may leave."""
    run_config, node_config = context.run_config, context.node_config

    def answer() -> Answer:
        body = from_record(message.content, expected=REQUEST, source="the server")
        client = LocalClient.from_node(
            run_config, node_config, registered_name(body), preprocessing_of(body)
        )
        return work(client, body)

    name = known_name(run_config, node_config)
    return Message(gate.answer_of(lambda: answered(answer), name), reply_to=message)


def answered(answer: Callable[[], Answer]) -> RecordDict:
    """Let a client make its answer; return it as it travels, with facts on the process."""
    # The same seed gives the same result, also on a GPU, where torch knows such an algorithm.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    reset_peak()
    tensors, manifest = answer().to_body()
    process = Process(peak_memory=peak_bytes(), versions=installed_versions())
    return to_record(tensors, manifest | process.to_body()[1])


app.query("identify")(_on(IdentifyRequest, lambda client, request: client.identify()))
app.query("describe")(_on(DescribeRequest, lambda client, request: client.describe(request)))
app.query("fisher")(_on(FisherRequest, lambda client, request: client.fisher(request)))
app.query("notice")(_on(NoticeRequest, lambda client, request: client.notice(request)))
app.query("realign")(_on(RealignRequest, composed.realign))
app.query("vote")(_on(VoteRequest, composed.vote))
app.evaluate()(_on(EvaluateRequest, composed.evaluate))
