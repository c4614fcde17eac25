"""The ServerApp: checks the settings, runs the strategy, writes the results."""

from __future__ import annotations

import json
import time
from logging import ERROR, INFO
from pathlib import Path

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from fedcompo.backbone import load_backbone
from fedcompo.config import RunConfig
from fedcompo.errors import ConfigError
from fedcompo.export import export_timm
from fedcompo.launcher import EVENTS, LOG, RESULTS, reserve_output
from fedcompo.report import write_report
from fedcompo.tensorfile import write_atomically
from server.exchange import Exchange
from server.results import collect
from server.strategy import PHASES, ItaStrategy

app = ServerApp()

MODEL = "model"
HOME_OUTPUT = "fedcompo-runs"


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run ITA once and leave the results in the output folder."""
    started = time.time()
    config = RunConfig.parse(context.run_config)
    output = claim_output(config)
    server = config.server
    exchange = Exchange(grid, server.timeout, server.min_clients, output / EVENTS)
    phases = [p for p in PHASES if p != "realign" or config.compose.realign]
    exchange.tell("run", clients=[], phases=phases)
    try:
        backbone = load_backbone(config.backbone)
        exchange.gather(server.num_clients)
        strategy = ItaStrategy(exchange, config, backbone, output)
        strategy.run()
        export_timm(output / MODEL, backbone, strategy.theta_p, strategy.joint_head)
        results = collect(strategy, started=started)
        write_report(output, results)
        text = json.dumps(results, indent=2, allow_nan=False) + "\n"
        write_atomically(output / RESULTS, text.encode())
    except BaseException as error:
        exchange.tell("failed", reason=f"{type(error).__name__}: {error}")
        log(ERROR, "The run failed: %s", error)
        raise
    exchange.tell("finished", results=RESULTS)
    log(INFO, "Results: %s", output)


def claim_output(config: RunConfig) -> Path:
    """Take a folder for this run alone.

    The launcher hands over a folder it has reserved. Started by plain ``flwr run``, this process
    stands in a folder of Flower's, where nobody would look: a relative path is refused, and none
    at all means ``~/fedcompo-runs/<data>``.

    Raises:
        ConfigError: If the path is relative.
        LaunchError: If no folder can be made there.
    """
    if not config.output:
        source = "".join(c if c.isalnum() else "-" for c in config.data.data).strip("-")
        return reserve_output(Path.home() / HOME_OUTPUT / source[-60:])
    output = Path(config.output).expanduser()
    if not output.is_absolute():
        raise ConfigError(
            f"`output` is {config.output!r}, but a run started by `flwr run` cannot know where you "
            "stand. Give an absolute path, or start it by `fedcompo simulate`."
        )
    if output.is_dir() and [path.name for path in output.iterdir()] == [LOG]:
        return output
    return reserve_output(output)
