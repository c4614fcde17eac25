"""The ClientApp: reads each request, lets the local client do the work, sends the answer."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients import averaging, composed
from clients.local import LocalClient
from fedcompo.errors import FedcompoError
from fedcompo.messages.answers import Answer, Process
from fedcompo.messages.body import Body, Content
from fedcompo.messages.records import from_record, refusal, to_record
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
    registered_name,
)
from fedcompo.runtime import installed_versions, peak_bytes, reset_peak

app = ClientApp()

Asked = TypeVar("Asked", bound=Content)
Work = Callable[[LocalClient, Body], Answer]


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Describe the images by statistics of the pre-trained features."""
    return _answer(message, context, _reading(DescribeRequest, LocalClient.describe))


@app.query("identify")
def identify(message: Message, context: Context) -> Message:
    """Send the client's name and classes."""
    return _answer(message, context, lambda client, body: client.identify())


@app.query("notice")
def notice(message: Message, context: Context) -> Message:
    """Log that another client was removed."""
    return _answer(message, context, _reading(NoticeRequest, LocalClient.notice))


@app.query("fisher")
def fisher(message: Message, context: Context) -> Message:
    """Sum the Fisher diagonal at the pre-trained weights."""
    return _answer(message, context, _reading(FisherRequest, LocalClient.fisher))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Fit the task vector, or train the model that all share (FedAvg, FedProx)."""

    def work(client: LocalClient, body: Body) -> Answer:
        if ROUND in body[1]:
            return averaging.train(client, AveragingRequest.from_body(body))
        return client.train(TrainRequest.from_body(body))

    return _answer(message, context, work)


@app.query("realign")
def realign(message: Message, context: Context) -> Message:
    """Describe the images by statistics of composed models' features."""
    return _answer(message, context, _reading(RealignRequest, composed.realign))


@app.query("vote")
def vote(message: Message, context: Context) -> Message:
    """Measure candidates for the composed model on images that were not trained on."""
    return _answer(message, context, _reading(VoteRequest, composed.vote))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the composed model on the client's test images."""
    return _answer(message, context, _reading(EvaluateRequest, composed.evaluate))


def _reading(request: type[Asked], work: Callable[[LocalClient, Asked], Answer]) -> Work:
    """Adapt work on a request to the body that the request travels as."""
    return lambda client, body: work(client, request.from_body(body))


def _answer(message: Message, context: Context, work: Work) -> Message:
    """Do the work; a ``FedcompoError`` is answered as a refusal with its text."""
    # The same seed gives the same result, also on a GPU, where torch knows such an algorithm.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    reset_peak()
    try:
        body = from_record(message.content, expected=REQUEST, source="the server")
        client = LocalClient.from_node(
            context.run_config, context.node_config, registered_name(body)
        )
        tensors, manifest = work(client, body).to_body()
        process = Process(peak_memory=peak_bytes(), versions=installed_versions())
        content = to_record(tensors, manifest | process.to_body()[1])
    except FedcompoError as error:
        content = refusal(f"{type(error).__name__}: {error}")
    return Message(content, reply_to=message)
