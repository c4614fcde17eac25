"""The engine of this very process: the real apps, one client after the other.

Messages go from app to app directly, without Flower's SuperLink and Ray. So a run starts at once,
loads the clients' backbone once, needs one process for hundreds of clients, and stops where a
debugger is told to. The results are those of Flower's engine, bit for bit.
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import FLOWER_LOGGER
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedcompo.config.setting import Scalar
from fedcompo.engine.run_folder import CLIENTS, LOG
from fedcompo.report.log import LogFormatter
from fedcompo.runtime import one_thread

FIRST_NODE = 1000
"""Id of the node of partition 0; the others follow."""


class InProcessGrid(Grid):  # type: ignore[misc]  # Flower comes without types
    """Passes each message to the ClientApp at once and keeps the reply until it is pulled."""

    in_flight = 1
    """Requests that a server should have under way: more would only lie in memory."""

    def __init__(self, app: ClientApp, run_config: Mapping[str, Scalar], clients: int) -> None:
        """Connect all nodes; node i gets ``partition-id`` i."""
        # A Message outside a Flower process needs an identity to be made at all.
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self.app = app
        self.answering = False
        """Whether a client is at work, and not the server."""
        self.replies: dict[str, Message] = {}
        self.contexts = [
            Context(
                run_id=1,
                node_id=FIRST_NODE + i,
                node_config={"partition-id": i, "num-partitions": clients},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for i in range(clients)
        ]

    def set_run(self, run: object) -> None:
        """Do nothing: there is only one run."""

    @property
    def run(self) -> None:
        """None: there is no SuperLink that knows of it."""

    def create_message(self, *args: object, **kwargs: object) -> Message:
        """Refuse: the app makes its messages itself."""
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all connected nodes."""
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return all nodes; they are always connected."""
        return [NodeInfo(node_id=c.node_id, name="", status="online") for c in self.contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let each message's client answer it, and keep the replies."""
        ids = []
        for message in messages:
            ids.append(str(uuid.uuid4()))
            message.metadata.__dict__["_message_id"] = ids[-1]
            partition = self.partition_of(message.metadata.dst_node_id)
            reply = None if partition is None else self.answer(message, partition)
            if reply is not None:
                self.replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return replies, each of them once."""
        return [self.replies.pop(i) for i in list(message_ids) if i in self.replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and pull their replies."""
        return self.pull_messages(self.push_messages(messages))

    def partition_of(self, node: int) -> int | None:
        """Return the partition of a node; None if it is no longer connected."""
        return node - FIRST_NODE

    def answer(self, message: Message, partition: int) -> Message | None:
        """Return one client's reply; None if it never arrives."""
        request = copy.copy(message)
        request.metadata.__dict__["_src_node_id"] = 1
        self.answering = True
        try:
            with one_thread():  # as Ray gives a client: the bits depend on it
                return self.app(request, self.contexts[partition])
        except Exception as error:  # as Flower does: whatever is raised becomes an error reply
            return Message(Error(code=2, reason=repr(error)), reply_to=request)
        finally:
            self.answering = False


def run_apps(config: Mapping[str, Scalar], clients: int, output: Path) -> None:
    """Run the ServerApp and the ClientApp, which can be imported, until the run has ended.

    Args:
        config: Settings that differ from the defaults; paths absolute.
        clients: Number of simulated clients.
        output: The run's own folder, for Flower's log and the clients' own.

    Raises:
        Exception: Whatever ends the ServerApp; the log has its traceback.
    """
    client_app, server_app = (import_module(f"{side}.app").app for side in ("clients", "server"))
    _forget()  # what was there in an earlier run may have changed
    grid = InProcessGrid(client_app, config, clients)
    context = Context(
        run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(config)
    )
    chosen = torch.get_deterministic_debug_mode()
    with _logging(grid, output / LOG), tempfile.TemporaryDirectory(prefix="fedcompo-") as state:
        variables = {"FEDCOMPO_STATE": state, "FEDCOMPO_CLIENT_LOGS": str(output / CLIENTS)}
        try:
            with patch.dict(os.environ, variables):
                server_app(grid, context)
        except Exception:
            logging.getLogger(__name__).exception("The ServerApp failed.")
            raise
        finally:
            torch.set_deterministic_debug_mode(chosen)  # clients use no others
            _forget()


def _forget() -> None:
    """Let go of what clients load once for all phases of a run."""
    loading = import_module("clients.loading")
    for kept in (loading.load_images, loading.load_shared_backbone, loading.simulated_names):
        kept.cache_clear()


@contextmanager
def _logging(grid: InProcessGrid, file: Path) -> Iterator[None]:
    """Append what the server logs to a file; what its clients log is theirs alone."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(LogFormatter())
    handler.setLevel(logging.INFO)
    handler.addFilter(lambda record: not grid.answering)
    root, printing, level = logging.getLogger(), FLOWER_LOGGER.handlers[:], FLOWER_LOGGER.level
    root.addHandler(handler)
    FLOWER_LOGGER.handlers.clear()  # they print; the root's handler has all that they have
    FLOWER_LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        FLOWER_LOGGER.handlers[:] = printing
        FLOWER_LOGGER.setLevel(level)
        root.removeHandler(handler)
        handler.close()
