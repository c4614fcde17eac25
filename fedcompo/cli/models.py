"""The commands that make models of a registry's members: compose, evaluate, negate, export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcompo.cli import common
from fedcompo.composition.settings import MEAN
from fedcompo.errors import ConfigError
from fedcompo.report.console import print_json, say
from fedcompo.report.progress import step
from fedcompo.report.units import listed

if TYPE_CHECKING:
    from fedcompo.export.selected import Selection

DataOption = Annotated[
    str | None,
    typer.Option(
        help="Images: digits, folder:<path>, npz:<path>; default: the clients' own, if at hand."
    ),
]


@common.with_options("choice", common.RuledChoice)
def compose(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of contributions; none: compose a registry's members."),
    ] = None,
    *,
    output: common.OutputOption,
    registry: common.RegistryOption = None,
    choice: common.RuledChoice,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Compose as this file says, in place of the options above."),
    ] = None,
    checkpoint: Annotated[
        str, typer.Option(help="With folders: file of the pre-trained weights they belong to.")
    ] = "",
    max_norm_ratio: Annotated[
        float,
        typer.Option(help="With folders: refuse a task vector this many times the median length."),
    ] = 0.0,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Compose a model and write a folder that plain timm loads, with a model card.

    One of tangents is linearised, which timm cannot do: fedcompo loads it, as its card says.

    Without FOLDERS it is made of a registry's members.

    With FOLDERS, one contribution each, it needs no registry and no server:

    fedcompo compose A/ B/ -o DIR

    The folder holds recipe.toml, from which --recipe makes the same bits of the same members. One
    written by hand may also give groups of weights, negative weights and the dtype.
    """
    with common.errors_as_sentences(verbose), common.progress(quiet=as_json):
        step("reading")
        chosen = choice.parsed() if recipe is None else _recipe_alone(recipe, choice)
        with _selected(folders, registry, checkpoint, max_norm_ratio, chosen) as selection:
            from fedcompo.export.folder import publish

            step("composing")
            written = publish(output, selection)
        report(written, as_json)


def specialise(
    clients: Annotated[str, typer.Argument(metavar="A,B", help="Clients to compose.")],
    *,
    output: common.OutputOption,
    registry: common.RegistryOption = None,
    weights: common.WeightsOption = None,
    scale: common.ScaleOption = None,
    rule: common.RuleOption = "",
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Compose a specialist of some clients; the same as `compose --only`.

    A,B are their names; `fedcompo list` lists them.
    """
    compose(
        output=output,
        registry=registry,
        only=clients,
        weights=weights,
        scale=scale,
        rule=rule,
        as_json=as_json,
        verbose=verbose,
    )


@common.with_options("choice", common.RuledChoice)
def evaluate(
    *,
    data: DataOption = None,
    registry: common.RegistryOption = None,
    choice: common.RuledChoice,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Measure a registry's model, or one of some of its members, on the clients' test images."""
    with common.errors_as_sentences(verbose):
        chosen = choice.parsed()
        opened = common.open_registry(registry)
        from fedcompo.audit.evaluation import evaluate_clients, figures_of, run_config_of
        from fedcompo.data.client_data import client_names
        from fedcompo.export.selection import from_registry
        from fedcompo.report.confusion import by_class

        with common.progress(quiet=as_json):
            selection = from_registry(opened, **chosen)
            backbone = opened.backbone.load()
            config = run_config_of(opened, data)
            found = evaluate_clients(
                backbone,
                dict(selection.stream()),
                selection.head,
                config,
                linearised=selection.pool.linearised,
            )
        figures = figures_of(found)
        tallies = {client: accuracy.tally for client, accuracy in found.items()}
        counted = by_class(tallies, selection.head.classes)
        unknown = [name for name in client_names(config.data) if name not in found]
        if as_json:
            told = {"clients": list(selection.pool.clients), "accuracy": figures}
            print_json({**told, "not_measured": unknown, **counted})
            return
        from fedcompo.cli.tables import print_accuracies, print_worst_classes

        print_accuracies(figures)
        print_worst_classes(counted)
        if unknown:
            say(f"Not measured, as the model does not know their classes: {listed(unknown)}.")
        say(f"Of the composition of {listed(selection.pool.clients)}.")


def negate(
    client: Annotated[str, typer.Argument(help="Client whose task vector is subtracted.")],
    *,
    output: common.OutputOption,
    registry: common.RegistryOption = None,
    strength: Annotated[float, typer.Option(help="How much of it is subtracted.")] = 1.0,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Write a copy of the model with a client's task vector subtracted: forget beyond absence.

    CLIENT is its name. The others are composed without it; then its task vector is subtracted.

    The copy is labelled as what it is, and never enters the registry.
    """
    with common.errors_as_sentences(verbose), common.progress(quiet=as_json):
        opened = common.open_registry(registry)
        opened.member(client)  # refuses at once who is not there
        from fedcompo.export.folder import publish
        from fedcompo.export.recipe import Negation, Recipe
        from fedcompo.export.selection import from_registry

        recipe = Recipe(negated=Negation(client, strength=strength))
        selection = from_registry(opened, recipe=recipe)
        step("composing")
        report(publish(output, selection), as_json)


def say_members(written: Mapping[str, Any]) -> None:
    """Say whom it was composed of, and how."""
    clients = ", ".join(f"{c} × {w:.4g}" for c, w in written["coefficients"].items())
    say(f"Composed of {clients}; {len(written['classes'])} classes.")
    rule = "" if written["rule"] == MEAN else f"By the rule {written['rule']}, "
    say(f"{rule}λ = {written['scale']:.4g}.")


def report(written: Mapping[str, Any], as_json: bool) -> None:
    """Say what was written, and how it is loaded."""
    if as_json:
        print_json(written)
        return
    say_members(written)
    if written["negated"]:
        say(f"A negated copy: {written['negated']} was subtracted. See its README.md.")
    folder = written["output"]
    load = f'import timm; timm.create_model("local-dir:{folder}", pretrained=True)'
    if written["linearised"]:
        say("Composed of tangents: it is linearised, which timm cannot do. See its README.md.")
        load = f'import fedcompo; fedcompo.load_tangent_model("{folder}")'
    say(f"Model: {folder}\n{load}")


def _recipe_alone(path: Path, choice: common.RuledChoice) -> dict[str, Any]:
    """Read a recipe; refuse options beside it that would say the same or something else."""
    if given := [f"`--{name}`" for name, value in vars(choice).items() if value not in (None, "")]:
        raise ConfigError(
            f"`--recipe` says all that is composed: leave out {', '.join(given)}, or write it into "
            f"{path}."
        )
    from fedcompo.export.recipe_file import read_recipe

    return {"recipe": read_recipe(path)}


@contextlib.contextmanager
def _selected(
    folders: list[Path] | None,
    registry: Path | None,
    checkpoint: str,
    ratio: float,
    choice: Mapping[str, Any],
) -> Iterator[Selection]:
    if folders and registry is not None:
        raise ConfigError("Name folders of contributions, or a registry, not both.")
    if checkpoint and not folders:
        raise ConfigError("`--checkpoint` goes with folders; a registry holds its own weights.")
    if not ratio >= 0 or (ratio and not folders):
        raise ConfigError("`--max-norm-ratio` goes with folders, and is a number >= 0.")
    opened = None if folders else common.open_registry(registry)  # refuses before torch is loaded
    from fedcompo.export.selection import from_folders, from_registry

    if opened is not None:
        yield from_registry(opened, **choice)
        return
    given = {"checkpoint": checkpoint, "max_norm_ratio": ratio, **choice}
    with from_folders(folders or (), **given) as chosen:
        yield chosen
