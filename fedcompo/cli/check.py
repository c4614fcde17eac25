"""The command that checks data and backbone before a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from fedcompo.cli import common
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.run import RunConfig
from fedcompo.config.scenario import settings_of
from fedcompo.errors import ConfigError
from fedcompo.report.console import print_json

SECONDS = 5.0
"""Time for each step of the checks."""


def check(
    data: Annotated[
        str,
        typer.Option(
            help="Folder or file of one client's own images, as its node has it; or a source of "
            "several clients, such as folder:<path> or digits. Default: that of the scenario."
        ),
    ] = "",
    client: Annotated[
        str, typer.Option(help="The client's name; then DATA is its own, whatever it is.")
    ] = "",
    scenario: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML file of settings of the run.")
    ] = None,
    assignments: common.AssignmentsOption = None,
    full: Annotated[
        bool, typer.Option("--full", help="Read every example whole, however long it takes.")
    ] = False,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Check data and backbone before a run: names, counts, files, and what the run will take.

    The exit code is 0 if a run can use them, and 1 if not; each fault says what to do. Nothing is
    written, and nothing leaves this machine.
    """
    with common.errors_as_sentences(verbose), common.progress(quiet=as_json):
        if not data and (client or scenario is None):
            raise ConfigError("Name the data by --data, or a --scenario that does.")
        from fedcompo.data.sources.kinds import is_path

        alone = bool(client) or is_path(data)
        options = {"data": data} if data and not alone else {}
        config = RunConfig.parse(settings_of(scenario, assignments or [], options))
        CompositionSettings.of(config)
        from fedcompo.engine.preflight import look
        from fedcompo.engine.resources import fair_resources
        from fedcompo.report.preflight import print_preflight

        at_once = 1 if alone else fair_resources(10**6, config.device).cpus
        found = look(
            config,
            own=data if alone else "",
            client=client,
            at_once=at_once,
            starts=not alone,
            seconds=math.inf if full else SECONDS,
        )
    at_once = min(at_once, max(1, found.total))
    if found.faults and alone and not client and Path(data).expanduser().is_dir():
        found.notes.append(
            f"This was checked as one client's own; folders of several: `--data folder:{data}`."
        )
    if as_json:
        print_json(found.values())
    else:
        print_preflight(found.values(), at_once=at_once)
    if found.faults:
        raise typer.Exit(1)
