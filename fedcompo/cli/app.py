"""The ``fedcompo`` command."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import fedcompo
from fedcompo.cli import common, keys, models, registry, service
from fedcompo.cli.audit import audit
from fedcompo.cli.certificates import check_certificate, request_certificate
from fedcompo.cli.check import check
from fedcompo.cli.deployment import init_deployment
from fedcompo.cli.export import export
from fedcompo.cli.fisher import fisher
from fedcompo.cli.fit import fit
from fedcompo.cli.imports import import_source
from fedcompo.cli.prediction import predict
from fedcompo.cli.push import push
from fedcompo.cli.release import release
from fedcompo.cli.report import report
from fedcompo.cli.serve import serve
from fedcompo.cli.tables import print_removal
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import EngineKind
from fedcompo.config.run import RunConfig, all_settings
from fedcompo.config.scenario import scenario_name, settings_of
from fedcompo.config.setting import Scalar
from fedcompo.errors import ConfigError
from fedcompo.report.console import PlainConsole, say

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    app()


def _print_version(asked: bool) -> None:
    if asked:
        say(fedcompo.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Federated fine-tuning into task vectors that add up to one model, and come out again."""


@app.command()
def simulate(
    scenario: Annotated[
        Path | None, typer.Argument(help="TOML file of settings; none: the default digits run.")
    ] = None,
    assignments: common.AssignmentsOption = None,
    output: Annotated[
        str | None,
        typer.Option(
            help="Folder of the results; default runs/<scenario>. If it holds something, "
            "<folder>-2, -3, ... is taken."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything drawn at random.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Go on with the interrupted run in this folder, with the settings it was begun "
            "with, and by `--engine`. Who has trained is not trained again.",
        ),
    ] = None,
    engine: Annotated[
        EngineKind,
        typer.Option(
            help="Flower's own, which runs clients side by side; or this very process, which "
            "starts at once and which a debugger can stop. The results are the same."
        ),
    ] = EngineKind.FLOWER,
    gpus_per_client: Annotated[
        float | None,
        typer.Option(min=0.0, help="GPUs a client of Flower's engine; default: an even share."),
    ] = None,
    check_first: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Check the data first; without, who cannot use theirs is left out in the run.",
        ),
    ] = True,
    details: Annotated[
        bool,
        typer.Option("--details", help="Print more: the vote on λ, the task vectors' overlaps, Ω."),
    ] = False,
    signing_key: common.SigningKeyOption = None,
    verbose: common.VerboseOption = False,
) -> None:
    """Simulate a federation on this machine.

    SCENARIO is a TOML file of settings; without one, the default digits run.

    Relative paths start where you stand, also those in a scenario (data, checkpoint, output).

    `fedcompo settings` lists all settings.
    """
    chosen = {"output": output, "seed": seed}
    options: dict[str, Scalar] = {key: v for key, v in chosen.items() if v is not None}
    with common.errors_as_sentences(verbose):
        if resume is not None and (scenario or assignments or options):
            raise ConfigError(
                "--resume takes all settings from the run that is there: give neither a scenario "
                "nor --set, --output or --seed with it."
            )
        if signing_key is not None:  # the run's processes inherit it
            from fedcompo.registry.signing import KEY

            os.environ[KEY] = str(signing_key.absolute())
        how = {"engine": engine, "gpus_per_client": gpus_per_client, "check": check_first}
        _simulate(scenario, assignments or [], options, resume, details=details, **how)


@app.command()
def settings(
    as_json: common.JsonOption = False,
    check: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Check a file of settings instead.")
    ] = None,
) -> None:
    """List all settings of a run: name, default, meaning."""
    if check is not None:
        with common.errors_as_sentences(verbose=False):
            CompositionSettings.of(RunConfig.parse(settings_of(check, (), {})))
        say(f"{check}: every setting is known, and in range.")
        return
    defaults = RunConfig().flat()
    rows = [
        {"setting": key, "default": defaults[key], "help": declared.metadata["help"]}
        for key, declared in all_settings().items()
    ]
    console = PlainConsole()
    if as_json:
        say(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    table = Table("setting", "default", "meaning")
    for row in rows:
        default = row["default"]
        shown = default if isinstance(default, str) and default else json.dumps(default)
        # The longest default breaks at its commas.
        table.add_row(str(row["setting"]), shown.replace(",", ",\n"), str(row["help"]))
    console.print(table)


NAMES = {registry.list_clients: "list", import_source: "import"}
for command in (
    check,
    fisher,
    fit,
    init_deployment,
    request_certificate,
    check_certificate,
    registry.create,
    registry.list_clients,
    import_source,
    registry.show,
    registry.add,
    registry.remove,
    keys.verify,
    keys.checkpoint,
    keys.rotate_key,
    models.compose,
    models.specialise,
    models.evaluate,
    models.negate,
    release,
    report,
    export,
    predict,
    push,
    serve,
    service.publish,
    service.fetch,
    service.members,
    service.request_removal,
    audit,
):
    app.command(NAMES.get(command))(command)


def _simulate(
    file: Path | None,
    assignments: list[str],
    options: dict[str, Scalar],
    resume: Path | None,
    *,
    details: bool,
    **how: Any,
) -> None:
    from fedcompo.engine.live import Display
    from fedcompo.engine.run_folder import RUN, begun_settings
    from fedcompo.engine.simulation import prepare

    console, again = PlainConsole(), resume is not None
    if resume is None:
        values = settings_of(file, assignments, options)
    else:
        values = begun_settings(resume.expanduser().absolute())
    with common.progress(quiet=False):  # of the check
        simulation = prepare(values, name=scenario_name(file, values), resuming=again, **how)
    if found := simulation.preflight:
        from fedcompo.report.preflight import lines_on

        for line in lines_on(found, at_once=simulation.resources.cpus):
            say(line)
    say(f"Simulating {simulation.clients} clients. Results go to {simulation.output}")
    try:
        with Display(console) as display:
            results = simulation.run(display.show)
    except KeyboardInterrupt:
        if (simulation.output / RUN).exists():
            resumed = ["fedcompo", "simulate", "--resume", str(simulation.output)]
            if how["engine"] is not EngineKind.FLOWER:
                resumed += ["--engine", how["engine"].value]
            resumed += [] if how["check"] else ["--no-check"]
            say(f"Go on with it by: {shlex.join(resumed)}", PlainConsole(stderr=True))
        raise
    if "removed" in results:
        print_removal(results)
    else:
        from fedcompo.report.results import print_results

        print_results(results, console, details=details)
    say(f"Results: {simulation.output}")
