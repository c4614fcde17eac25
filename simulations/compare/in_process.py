"""Run a scenario in this very process: the real apps, one client after the other, no engine.

    python simulations/compare/in_process.py --output runs/quick --set kind=full
    python simulations/compare/in_process.py simulations/digits.toml --output runs/quick

Messages go from app to app directly, without Flower's SuperLink and Ray. So a run starts at once,
loads the backbone once, needs one process for hundreds of clients, and works under a debugger. The
results are the same. Comparisons of many runs use it; a real federation does not.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedcompo.config.run import RunConfig
from fedcompo.config.scenario import settings_of
from fedcompo.config.setting import Scalar
from fedcompo.data.client_data import client_names
from fedcompo.engine.launcher import find_app
from fedcompo.engine.run_folder import RESULTS, reserve_output
from fedcompo.errors import FedcompoError

FIRST_NODE = 1000
"""Id of the node of partition 0; the others follow."""


class InProcessGrid(Grid):
    """Passes each message to the ClientApp at once and keeps the reply until it is pulled."""

    def __init__(self, app: ClientApp, run_config: Mapping[str, Scalar], clients: int) -> None:
        """Connect all nodes; node i gets ``partition-id`` i."""
        # A Message outside a Flower process needs an identity to be made at all.
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self.app = app
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
        """None: there is no engine."""

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
        try:
            return self.app(request, self.contexts[partition])
        except Exception as error:  # as Flower does: whatever is raised becomes an error reply
            return Message(Error(code=2, reason=repr(error)), reply_to=request)


def run_in_process(settings: Mapping[str, Scalar], output: Path) -> dict:
    """Run the apps with settings whose paths are absolute, in a folder reserved for the run.

    Returns what ``results.json`` holds, raises what the run raises.
    """
    sys.path.insert(0, str(find_app()))
    from clients.app import app as client_app
    from server.app import app as server_app

    clients = len(client_names(RunConfig.parse(settings).data))
    config = {**settings, "output": str(output)}
    config["num-clients"] = config.get("num-clients") or clients
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    server_app(InProcessGrid(client_app, config, clients), context)
    return json.loads((output / RESULTS).read_text(encoding="utf-8"))


def main() -> None:
    """Parse the command line, run, print where the results are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("scenario", nargs="?", type=Path, help="TOML file; default: the digits")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    try:
        settings = settings_of(arguments.scenario, arguments.set, {})
        output = reserve_output(arguments.output.absolute())
        results = run_in_process(settings, output)
    except FedcompoError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    accuracy = results.get("class_il_accuracy")
    print(f"class-IL {accuracy:.4f}. " if accuracy is not None else "", f"Results: {output}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as state:  # what simulated clients keep
        os.environ["FEDCOMPO_STATE"] = state
        main()
