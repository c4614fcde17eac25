"""The ServerApp: checks the settings, trains or removes clients, writes the results."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable
from contextlib import suppress
from logging import ERROR, INFO
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from fedcompo.backbone.backbone import Backbone, load_backbone
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Action, Method, Schedule
from fedcompo.config.run import RunConfig
from fedcompo.engine.run_folder import EVENTS, LOG, RESULTS, RUN, reserve_output
from fedcompo.errors import BackboneMismatch, ConfigError
from fedcompo.registry.registry import Registry
from fedcompo.registry.state import ABOUT
from fedcompo.report.results import write_report
from fedcompo.storage.files import write_atomically
from server import averaging, unlearning
from server.averaging import Averaging
from server.exchange.exchange import Exchange
from server.results import collect, collect_averaging, collect_removal
from server.resume import Working, check_interrupted, clear
from server.sequential import Arrivals
from server.strategy import IelStrategy, ItaStrategy, Strategy
from server.unlearning import Unlearning

app = ServerApp()

REGISTRY = "registry"
HOME_OUTPUT = "fedcompo-runs"

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
RESUMABLE = tuple((Action.TRAIN, method) for method in (Method.ITA, Method.IEL))
"""What can go on where it was interrupted."""

Work = Callable[[Exchange, RunConfig, Path, float], dict[str, Any]]
"""What a run does, given its output folder and when it started; returns its results."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Do what `action` says, once, and leave the results in the output folder."""
    started = time.time()
    config = RunConfig.parse(context.run_config)
    config.caps.check_head_start(config.train.head_start)
    output = claim_output(config)
    server = config.server
    exchange = Exchange(
        grid,
        server.timeout,
        server.min_clients,
        in_flight=server.in_flight,
        events=output / EVENTS,
    )
    work, phases = work_of(config)
    wanted = [p for p in phases if p != "realign" or config.compose.realign]
    exchange.tell("run", clients=[], phases=wanted)
    try:
        results = work(exchange, config, output, started)
        text = json.dumps(results, indent=2, allow_nan=False) + "\n"
        write_atomically(output / RESULTS, text.encode())
        clear(output)
    except BaseException as error:
        log(ERROR, "The run failed: %s", error)
        if isinstance(error, OSError) and error.errno in DISK and (output / RUN).exists():
            log(ERROR, "See to the server's disk, then go on with `resume`: nothing is lost.")
        with suppress(OSError):  # a full disk must not hide what happened
            exchange.tell("failed", reason=f"{type(error).__name__}: {error}")
        raise
    exchange.tell("finished", results=RESULTS)
    if results.get("class_il_accuracy") is not None:
        class_il, task_il = (100 * results[f"{name}_il_accuracy"] for name in ("class", "task"))
        log(INFO, "Accuracy: class-IL %.1f %%, task-IL %.1f %%", class_il, task_il)
    log(INFO, "Results: %s", output)


def work_of(config: RunConfig) -> tuple[Work, tuple[str, ...]]:
    """What a run does, and the phases that it goes through."""
    if config.registry.action is Action.REMOVE:
        return _remove, unlearning.phases_of(config)
    if config.method.method in averaging.METHODS:
        return _average, Averaging.phases
    return _train, strategy_of(config).phases


def _train(exchange: Exchange, config: RunConfig, output: Path, started: float) -> dict[str, Any]:
    """Train new clients; they join the registry."""
    backbone = load_backbone(config.backbone)
    registry = open_or_create(config, backbone, output)
    working = Working.open(output, config, registry)
    exchange.answers = working.answers
    # Members count: a single newcomer can join them.
    exchange.min_clients = max(1, exchange.min_clients - len(working.members))
    if registry.clients and registry.settings != CompositionSettings.of(config):
        exchange.note("The registry composes with its own settings, not with this run's.")
    exchange.gather(config.server.num_clients)
    chosen = strategy_of(config)(exchange, config, backbone, registry, working)
    chosen.run()
    results = collect(chosen, started=started)
    write_report(output, results)
    return results


def _average(exchange: Exchange, config: RunConfig, output: Path, started: float) -> dict[str, Any]:
    """Train one model of all clients by FedAvg or FedProx; no registry comes of it."""
    averaged = Averaging(exchange, config, load_backbone(config.backbone), output)
    exchange.gather(config.server.num_clients)
    averaged.run()
    results = collect_averaging(averaged, started=started)
    write_report(output, results)
    return results


def strategy_of(config: RunConfig) -> type[Strategy]:
    """How a run comes from clients to a model."""
    if config.method.schedule is Schedule.SEQUENTIAL:
        return Arrivals
    return IelStrategy if config.method.method is Method.IEL else ItaStrategy


def _remove(exchange: Exchange, config: RunConfig, output: Path, started: float) -> dict[str, Any]:
    """Remove a client; those who stay are told, asked and measured as far as they are there."""
    registry = Registry(registry_path(config))
    exchange.min_clients = 0
    removal = Unlearning(exchange, config, registry.backbone.load(), registry, output)
    exchange.gather(config.server.num_clients)
    removal.run()
    return collect_removal(removal, started=started)


def open_or_create(config: RunConfig, backbone: Backbone, output: Path) -> Registry:
    """Open the registry that is named, or make one: there, or in the output.

    Raises:
        BackboneMismatch: If it is one of other pre-trained weights.
        RegistryError: If it cannot be opened or made.
    """
    path = registry_path(config) if config.registry.registry else output / REGISTRY
    if not (path / ABOUT).exists():
        return Registry.create(path, backbone, CompositionSettings.of(config))
    registry = Registry(path)
    if registry.state.base != backbone.fingerprint:
        raise BackboneMismatch(
            f"The registry {path} is one of the backbone {registry.state.base}, this run's is "
            f"{backbone.fingerprint}. Use the same `backbone` and `checkpoint`, or another "
            "registry."
        )
    return registry


def registry_path(config: RunConfig) -> Path:
    """Folder of the registry that is named; raises ``ConfigError`` unless the path is absolute."""
    path = Path(config.registry.registry).expanduser()
    if not path.is_absolute():
        raise ConfigError(
            f"`registry` is {config.registry.registry!r}; a run started by `flwr run` needs an "
            "absolute path. `fedcompo simulate` takes relative ones."
        )
    return path


def claim_output(config: RunConfig) -> Path:
    """Take a folder for this run alone.

    The launcher hands over a folder it has reserved. Started by plain ``flwr run``, this process
    stands in a folder of Flower's, where nobody would look: a relative path is refused, and none
    at all means ``~/fedcompo-runs/<data>``.

    Raises:
        ConfigError: If the path is relative, or `resume` is set and nothing can be resumed there.
        LaunchError: If no folder can be made there.
    """
    if config.server.resume and (config.registry.action, config.method.method) not in RESUMABLE:
        raise ConfigError(
            f"`resume` is set, but a run of {config.method.method} or a removal starts anew."
        )
    if config.server.resume and not config.output:
        raise ConfigError("`resume` is set, but not `output`: name the folder of the run.")
    if not config.output:
        source = "".join(c if c.isalnum() else "-" for c in config.data.data).strip("-")
        return reserve_output(Path.home() / HOME_OUTPUT / source[-60:])
    output = Path(config.output).expanduser()
    if not output.is_absolute():
        raise ConfigError(
            f"`output` is {config.output!r}, but a run started by `flwr run` cannot know where you "
            "stand. Give an absolute path, or start it by `fedcompo simulate`."
        )
    if config.server.resume:
        check_interrupted(output)
        return output
    if output.is_dir() and [path.name for path in output.iterdir()] == [LOG]:
        return output
    return reserve_output(output)
