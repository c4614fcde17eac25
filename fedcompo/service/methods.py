"""The methods of ``registry.proto``, for those who call them and for who serves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from fedcompo.service import registry_pb2 as wire

SERVICE = wire.DESCRIPTOR.services_by_name["Registry"]
NAME = SERVICE.full_name


class RegistryStub:
    """Has each method of the protocol as an attribute: a callable, given request and timeout."""

    def __init__(self, channel: grpc.Channel) -> None:
        """Prepare calls over a channel; none is made."""
        for method in SERVICE.methods:
            call = getattr(channel, _kind(method))(
                f"/{NAME}/{method.name}",
                request_serializer=_message(method.input_type).SerializeToString,
                response_deserializer=_message(method.output_type).FromString,
            )
            setattr(self, method.name, call)

    def __getattr__(self, name: str) -> Any:
        """Say that there is no such method."""
        raise AttributeError(f"The protocol has no method {name!r}.")


def serve_methods(server: grpc.Server, **behaviours: Callable[[Any, Any], Any]) -> None:
    """Let a server answer the protocol's methods; raises ``KeyError`` if one is missing."""
    handlers = {
        method.name: getattr(grpc, f"{_kind(method)}_rpc_method_handler")(
            behaviours[method.name],
            request_deserializer=_message(method.input_type).FromString,
            response_serializer=_message(method.output_type).SerializeToString,
        )
        for method in SERVICE.methods
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(NAME, handlers)])


def _kind(method: Any) -> str:
    """How many messages go either way, as grpc calls it: ``unary_stream``, for example."""
    word = ("unary", "stream")
    return f"{word[method.client_streaming]}_{word[method.server_streaming]}"


def _message(described: Any) -> Any:
    return getattr(wire, described.name)
