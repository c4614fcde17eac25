"""Simulates a federation on this machine: from settings to results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.caps import CapsConfig
from fedcompo.config.choices import Action, EngineKind
from fedcompo.config.data import DataConfig
from fedcompo.config.presets import with_preset
from fedcompo.config.run import BackboneConfig, RunConfig
from fedcompo.config.scenario import scenario_name, with_absolute_paths
from fedcompo.config.setting import Scalar, names_of
from fedcompo.engine import launcher
from fedcompo.engine.launcher import OnEvent, Simulation
from fedcompo.engine.resources import fair_resources
from fedcompo.engine.run_folder import reopen_output, reserve_output
from fedcompo.errors import ConfigError
from fedcompo.names import check_client_names
from fedcompo.report.tracking import require


def simulate(
    settings: RunConfig | Mapping[str, Scalar] | None = None,
    *,
    output: Path | str | None = None,
    engine: EngineKind | str = EngineKind.FLOWER,
    gpus_per_client: float | None = None,
    check: bool = True,
    on_event: OnEvent = lambda event: None,
) -> dict[str, Any]:
    """Simulate a federation on this machine.

    With Flower's engine it takes minutes, and ends every process that it started, however it ends.
    In this process it starts at once, clients take turns, and a debugger can stop in them. The
    results are the same, bit for bit. Example::

        results = simulate({"kind": "lora", "num-tasks": 3}, output="runs/lora")
        results["class_il_accuracy"], results["settings"]["output"]

    Args:
        settings: Settings that differ from the defaults, by the names that ``fedcompo settings``
            lists, or a whole :class:`~fedcompo.config.run.RunConfig`. Relative paths start in the
            working directory.
        output: Folder of the results; default ``runs/<data>``. If it holds something,
            ``<folder>-2``, ``<folder>-3``, ... is taken.
        engine: ``flower``, or ``in-process``.
        gpus_per_client: GPUs a client of Flower's engine; default: an even share.
        check: Refuse data that cannot be used before anything starts; without, clients whose data
            cannot be used are left out.
        on_event: Called with each event of the run; see :mod:`fedcompo.engine.log`.

    Returns:
        The content of ``results.json``; its ``settings`` name its folder as ``output``.

    Raises:
        ConfigError: If a setting cannot be used; with all faults.
        DataError: If the data cannot be used.
        LaunchError: If the run could not start or failed; with the reason.
    """
    if engine not in list(EngineKind):
        raise ConfigError(f"`engine` is {engine!r}, expected one of {', '.join(EngineKind)}.")
    values = settings.flat() if isinstance(settings, RunConfig) else dict(settings or {})
    if output is not None:
        values["output"] = str(output)
    values = with_preset(values)
    RunConfig.parse(values)
    values = with_absolute_paths(values, Path.cwd())
    return prepare(
        values,
        name=scenario_name(None, values),
        engine=EngineKind(engine),
        gpus_per_client=gpus_per_client,
        check=check,
    ).run(on_event)


def count_clients(config: RunConfig) -> int:
    """Return the number of clients to simulate: ``num-clients``, or else all of the data.

    Raises:
        ConfigError: If more clients are asked for than there are, or fewer than the run needs.
        DataError: If the data cannot be used.
        ContributionError: If a folder's name cannot be a client's.
    """
    from fedcompo.data.partition import client_names

    names = client_names(config.data)
    available = len(names)
    if config.server.num_clients > available:
        raise ConfigError(
            f"`num-clients` asks for {config.server.num_clients} clients, "
            f"but {config.data.data} yields {available}."
        )
    clients = config.server.num_clients or available
    if clients < config.server.min_clients:
        raise ConfigError(
            f"The run needs {config.server.min_clients} clients (`min-clients`), "
            f"but would get {clients} from {config.data.data}."
        )
    check_client_names(names[:clients])
    return clients


def prepare(
    settings: Mapping[str, Scalar],
    *,
    name: str,
    engine: EngineKind = EngineKind.FLOWER,
    resuming: bool = False,
    gpus_per_client: float | None = None,
    check: bool = True,
) -> Simulation:
    """Count the clients, check their data, and take a folder for the results.

    Args:
        settings: Those that differ from the defaults; paths absolute.
        name: Of the folder below ``runs/``, where the settings name no output.
        engine: What runs the apps.
        resuming: Go on in the folder of an interrupted run instead of taking a new one.
        gpus_per_client: As for :func:`simulate`.
        check: As for :func:`simulate`.

    Raises:
        ConfigError: If the settings, or the shares of the machine, cannot be used.
        DataError: If the data cannot be used.
        ContributionError: If a folder's name cannot be a client's.
        LaunchError: If there is no app, or no folder can be made.
    """
    config = RunConfig.parse(settings)
    CompositionSettings.of(config)  # refuses a rule that cannot be used
    require(names_of(config.server.track))
    clients = count_clients(config)
    at_most = 1 if engine is EngineKind.IN_PROCESS else clients  # at a time
    resources = fair_resources(at_most, config.device, gpus_per_client=gpus_per_client)
    app = launcher.find_app()
    found: dict[str, Any] = {}
    own = config.data, config.backbone, config.caps
    usual = DataConfig(), BackboneConfig(), CapsConfig()  # which are known to work
    if check and config.registry.action is Action.TRAIN and own != usual:
        from fedcompo.engine.preflight import LONGEST, look  # imports torch

        starts = engine is EngineKind.FLOWER
        checked = look(config, at_once=resources.cpus, starts=starts, longest=LONGEST)
        found = checked.require().values()
    if resuming:
        output = reopen_output(Path(config.output))
    else:
        if config.registry.action is Action.REMOVE:
            name = f"remove-{config.registry.client}"
        output = reserve_output(Path(config.output or Path.cwd() / "runs" / name))
    return Simulation(settings, output, clients, app, resources, engine, found)
