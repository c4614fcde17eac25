"""A Flower app of a few lines, to try the launcher on, and a `fedcompo` command that runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROJECT = """
[project]
name = "tiny"
version = "1.0.0"
description = "Tries a launcher."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "tiny_server.app:app"
clientapp = "tiny_clients.app:app"

[tool.flwr.app.config]
output = ""
checkpoint = ""
num-clients = 0
num-tasks = 5
behaviour = "{behaviour}"
"""

SERVER = """
import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    output = Path(context.run_config["output"])
    behaviour = context.run_config["behaviour"]

    def report(**event):
        with (output / "events.jsonl").open("a") as events:
            events.write(json.dumps({**event, "time": time.time()}) + chr(10))

    if behaviour == "raise":
        raise RuntimeError("the dog ate the weights")
    report(event="run", clients=[], phases=["train"])
    while len(nodes := list(grid.get_node_ids())) < context.run_config["num-clients"]:
        time.sleep(0.1)
    report(event="phase-started", phase="train", clients=[])
    content = RecordDict({"config": ConfigRecord({"behaviour": behaviour})})
    replies = list(grid.send_and_receive([Message(content, node, "train") for node in nodes]))
    report(event="note", text=f"{len(replies)} replies")
    if behaviour != "forget":
        results = {"replies": len(replies), "checkpoint": context.run_config["checkpoint"]}
        (output / "results.json").write_text(json.dumps(results))
    report(event="finished", results="results.json")
"""

CLIENTS = """
import subprocess
import time

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    print("a client works", flush=True)
    if message.content["config"]["behaviour"] == "hang":
        subprocess.Popen(["setsid", "sleep", "300"])
        time.sleep(300)
    return Message(RecordDict(), reply_to=message)
"""

COMMAND = """
import sys, types
from pathlib import Path

sys.path.insert(0, {library!r})
from fedcompo.cli import app as cli
from fedcompo.engine import launcher

launcher.find_app = lambda: Path({app!r})
report = types.ModuleType("fedcompo.report.results")
report.print_results = lambda results, console, **_: console.print("replies:", results["replies"])
sys.modules["fedcompo.report.results"] = report
cli.main()
"""


def write_app(folder: Path, behaviour: str) -> Path:
    """Write the app; it completes, or does what its behaviour says: raise, forget, hang."""
    for name, code in (("tiny_server", SERVER), ("tiny_clients", CLIENTS)):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
        (folder / name / "app.py").write_text(code)
    (folder / "pyproject.toml").write_text(PROJECT.format(behaviour=behaviour))
    return folder


def fedcompo(app: Path, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Start `fedcompo` with the app in place of its own."""
    library = str(Path(__file__).resolve().parents[2])
    code = COMMAND.format(library=library, app=str(app))
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_hear_interrupts,
    )


def _hear_interrupts() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.default_int_handler)
