"""Submits one run to a SuperLink, passes on what it logs, and says how it ended.

    python control.py FOLDER

A process of its own, in the engine's environment, does what ``flwr run``, ``flwr log`` and
``flwr list`` do, each of which imports Flower anew. It loads Flower and bundles the app while the
SuperLink starts; see :class:`fedcompo.engine.superlink.Engine`. FOLDER is the engine's.

It reads a line of JSON: ``app``, ``run`` and ``federation``; and, once the SuperLink listens, its
``address``. It prints what the run logs to standard error, and to standard output a line of JSON
when the run has started (``run``) and when it has ended (``status``, ``details``), or an ``error``.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.cli.cli_client_interceptor import CliClientHttpInterceptor
from flwr.common.serde import fab_to_proto, run_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest, StreamLogsRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.utils import simulation_config_from_json

UNANSWERED = 5
"""A run is given up after so many unanswered questions in a row, a second apart."""


def main() -> None:
    """Do what the top of this file says."""
    try:
        asked = json.loads(sys.stdin.readline())
        bundle = bundled(Path(asked["app"]))
        request = StartRunRequest(
            fab=fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})),
            override_config=user_config_to_proto(asked["run"]),
            override_federation_config=simulation_config_from_json(asked["federation"]),
        )
        client = ControlHttpClient.from_server_address(
            json.loads(sys.stdin.readline())["address"],
            insecure=True,
            root_certificates=None,
            interceptors=[
                CliClientHttpInterceptor(),
                RuntimeVersionHttpInterceptor(component_name="flwr CLI"),
            ],
        )
        started = client.StartRun(request)
        if not started.HasField("run_id"):
            raise RuntimeError(f"the SuperLink has not started the run: {started}")
        _tell(run=str(started.run_id))
        _tell(**_follow(client, started.run_id))
    except Exception as error:
        said = error.response.text if isinstance(error, httpx.HTTPStatusError) else ""
        _tell(error=f"{type(error).__name__}: {error} {said}".strip())


def bundled(app: Path) -> bytes:
    """Bundle an app, as Flower does; where it names its files, without a look at all others."""
    project = tomllib.loads((app / "pyproject.toml").read_text(encoding="utf-8"))
    named = project["tool"]["flwr"]["app"].get("fab-include", ["**/*"])
    own = ("pyproject.toml", ".gitignore", "LICENSE", *named)
    files = {path for pattern in own for path in app.glob(pattern) if path.is_file()}
    paths = {path.relative_to(app).as_posix(): path for path in files}
    return bytes(build_fab_from_files(paths)[0])


def _follow(client: ControlHttpClient, run_id: int) -> dict[str, str]:
    """Print what a run logs until it has ended; returns how it has."""
    latest, unanswered = 0.0, 0
    while True:
        try:
            since = StreamLogsRequest(run_id=run_id, after_timestamp=latest)
            for logged in client.StreamLogs(since):
                latest = logged.latest_timestamp
                sys.stderr.write(logged.log_output)
            answer = client.ListRuns(ListRunsRequest(run_id=run_id))
            status = run_from_proto(answer.run_dict[run_id]).status
            if status.status == "finished":
                return {"status": f"finished:{status.sub_status}", "details": status.details}
            unanswered = 0
        except (httpx.HTTPError, ValueError):
            unanswered += 1
            if unanswered == UNANSWERED:
                raise
        time.sleep(1.0)


def _tell(**said: Any) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
