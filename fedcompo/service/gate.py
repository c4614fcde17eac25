"""Checks every call: its caller, its rate and its duration; turns errors into a status.

It stands before all methods, health included. A message that cannot be parsed is
refused like any other fault of the caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from fedcompo.errors import FedcompoError
from fedcompo.service.access import Revoked, peer_of
from fedcompo.service.limits import Limits, Turns
from fedcompo.service.refusals import LOGGER, Code, Refused, answer_to, log_call
from fedcompo.service.waiting import Call, Watch

Behaviour = Callable[[Any, grpc.ServicerContext], Any]


class Malformed:
    """Stands for a message that cannot be parsed."""


class Gate(grpc.ServerInterceptor):  # type: ignore[misc]  # grpc comes without types
    """Admits calls within the limits, and turns their errors into a status."""

    def __init__(self, limits: Limits, hidden: Mapping[Path, str], revoked: Revoked) -> None:
        """Describe what is admitted, and what no answer may reveal.

        Args:
            limits: The service's.
            hidden: Folders that no answer may name, and what to call them instead.
            revoked: Certificates that are refused.
        """
        self._hidden, self._revoked, self._turns = hidden, revoked, Turns(limits)
        self._watch = Watch(idle=limits.idle, seconds=limits.seconds)

    def intercept_service(
        self, continuation: Callable[[Any], Any], details: grpc.HandlerCallDetails
    ) -> Any:
        """Put the gate before a method."""
        handler = continuation(details)
        if handler is None:
            return None
        # On the wire a single request is a stream of one. Read as a stream, it is awaited behind
        # the gate; grpc would wait for it before, for ever, and keep a thread for it.
        word, streams = ("unary", "stream"), handler.response_streaming
        attribute = f"{word[handler.request_streaming]}_{word[streams]}"
        guard = self._streaming if streams else self._single
        build = getattr(grpc, f"stream_{word[streams]}_rpc_method_handler")
        return build(
            guard(getattr(handler, attribute), details.method, handler.request_streaming),
            request_deserializer=_deserialiser(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _single(self, behaviour: Behaviour, method: str, streaming: bool) -> Behaviour:
        def as_stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            yield behaviour(request, context)

        guarded = self._streaming(as_stream, method, streaming)
        return lambda requests, context: list(guarded(requests, context)).pop()

    def _streaming(self, behaviour: Behaviour, method: str, streaming: bool) -> Behaviour:
        def guarded(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            try:
                with self._admitted(method, context) as call:
                    request = _parsed(call.received(requests), streaming)
                    yield from call.sent(behaviour(request, context))
                return
            except Exception as error:
                code, sentence = self._refusal(method, context, error)
            context.abort(code, sentence)

        return guarded

    @contextmanager
    def _admitted(self, method: str, context: grpc.ServicerContext) -> Iterator[Call]:
        """Count the call, and look after it: its client may stall."""
        peer = peer_of(context)
        self._revoked.require_valid(peer)
        began = time.monotonic()
        with self._turns.taken(peer), self._watch.over(context) as call:
            yield call
        seconds = round(time.monotonic() - began, 3)
        log_call("served", method=method, peer=peer.signature, seconds=seconds)

    def _refusal(
        self, method: str, context: grpc.ServicerContext, error: Exception
    ) -> tuple[grpc.StatusCode, str]:
        """Log a refusal and its caller; returns how to end the call.

        The error is not kept: its frames would keep the call, and with it a stream, open.
        """
        if isinstance(error, grpc.RpcError):  # the client went away, or its time was over
            error = Refused(Code.CANCELLED, "The call was broken off before it was answered.")
        code, sentence = answer_to(error, self._hidden)
        try:
            caller = peer_of(context).signature
        except FedcompoError:
            caller = "nobody"
        if not (isinstance(error, Refused) and error.quiet):
            log_call(
                "refused",
                method=method,
                peer=caller,
                address=context.peer(),
                code=code.name,
                why=str(error),
            )
        if code is Code.INTERNAL:
            LOGGER.error("%s failed", method, exc_info=error)
        return code, sentence


def time_left(context: grpc.ServicerContext, limits: Limits) -> float:
    """Seconds that a call may still take."""
    remaining = context.time_remaining()
    return limits.seconds if remaining is None else min(float(remaining), limits.seconds)


def _deserialiser(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Parse messages; grpc itself would report a malformed one as a failure of the server."""

    def deserialise(data: bytes) -> Any:
        try:
            return parse(data)
        except Exception:  # whatever strange bytes can provoke
            return Malformed()

    return deserialise


def _parsed(requests: Iterator[Any], streaming: bool) -> Any:
    """The stream of requests, or its only one; raises ``Refused`` if one cannot be parsed."""
    messages = map(_well_formed, requests)
    return messages if streaming else _well_formed(next(messages, Malformed()))


def _well_formed(message: Any) -> Any:
    if isinstance(message, Malformed):
        raise Refused(
            Code.INVALID_ARGUMENT,
            "The message is no protocol buffer of the expected type. See registry.proto.",
        )
    return message
