"""The command that takes in models that were fine-tuned elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcompo.cli import common
from fedcompo.config.caps import FEWEST_IMAGES
from fedcompo.config.presets import STAND_IN
from fedcompo.errors import BackboneError, ConfigError, ContributionError
from fedcompo.report.console import print_json, say
from fedcompo.report.progress import step

if TYPE_CHECKING:
    from fedcompo.backbone.backbone import Backbone
    from fedcompo.method.fisher import FisherDiagonal
    from fedcompo.method.images import Images

FISHER_IMAGES = 256
"""Images, drawn at random, that the Fisher is estimated on at most: it takes longest."""


def import_source(
    source: Annotated[str, typer.Argument(help="A checkpoint, or a folder of one or an adapter.")],
    *,
    client: Annotated[str, typer.Option(help="Name of the contribution.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Its images, as in `fedcompo fit`, to describe it by. Default: none, and the rows "
            "of its classifier stand for them."
        ),
    ] = None,
    registry: common.RegistryOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write a contribution's folder; add nothing."),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Names of the rows of its classifier, in their order."),
    ] = None,
    delta: Annotated[
        bool, typer.Option("--delta", help="SOURCE holds θ - θ₀, the change alone.")
    ] = False,
    drop_rest: Annotated[
        bool,
        typer.Option("--drop-rest", help="Leave out what it changed beside the target weights."),
    ] = False,
    min_images: Annotated[
        int | None, typer.Option(min=1, help="With --data: fewest images of a class; default: 8.")
    ] = None,
    counts_as: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Without --data: images that each class counts as; default: as many as a class of "
            "the others.",
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the place of the client of that name.")
    ] = False,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Make a client of a model that was fine-tuned elsewhere from the registry's weights.

    SOURCE is a checkpoint of timm or of Hugging Face's transformers (.safetensors, .pth), the
    folder of one, or the folder of a LoRA or (IA)³ adapter that PEFT wrote; or hf-hub:<repository>.
    """
    with common.errors_as_sentences(verbose):
        if (min_images if data is None else counts_as) is not None:
            raise ConfigError(
                "`--min-images` goes with `--data`, and `--counts-as` without it. Leave it out."
            )
        if replace and output is not None:
            raise ConfigError("With `--output` nothing is added, so `--replace` replaces nobody.")
        opened = common.open_registry(registry)
        if output is None and not replace and client in opened.clients:
            raise ContributionError(
                f"{client!r} is in {opened.path} already. `--replace` takes it out and this one "
                "in; or choose another name."
            )
        from fedcompo.export.selection import new_folder
        from fedcompo.registry.imports import Wanted, import_model
        from fedcompo.registry.registry import Registry

        with common.progress(quiet=as_json):
            made = import_model(
                source,
                opened,
                client=client,
                data=data,
                wanted=Wanted(
                    classes=common.listed_names(classes),
                    difference=delta,
                    drop_rest=drop_rest,
                    min_images=min_images or FEWEST_IMAGES,
                    counts_as=counts_as or 0,
                ),
                fisher_of=partial(_fisher_of, client=client),
            )
            if output is None:
                Registry(opened.path).add(made, replacing=replace)
            else:
                with new_folder(output) as folder:
                    made.save(folder)
        told = {"client": client, "output": str(output or opened.path), **made.settings}
        if as_json:
            print_json(told)
        else:
            _print(told, made.num_examples // len(made.head.classes))


def _fisher_of(
    backbone: Backbone, images: Images, *, client: str
) -> tuple[FisherDiagonal | None, str]:
    """Estimate the Fisher of the features as a run's clients do, of fewer images."""
    from fedcompo.config.run import FisherConfig
    from fedcompo.training.probing import fisher_of_images

    step("estimating the Fisher")
    config = FisherConfig(fisher_examples=FISHER_IMAGES)
    try:
        return fisher_of_images(backbone, images, config, seed=0, owner=client)[0].reduced(), ""
    except BackboneError as error:  # a target weight is used outside a layer
        return None, str(error)


def _print(told: Mapping[str, Any], counts_as: int) -> None:
    """Say what was imported, what was left out, and what nobody can tell of it."""
    say(f"Imported {told['client']} to {told['output']}; its head is {told['imported-head']}.")
    if told["imported-dropped"]:
        say(f"Left out: {told['imported-dropped']}.")
    if why := told.get("imported-no-fisher"):
        say(f"Note: it has no Fisher. {why}")
    if base := told.get("imported-base"):
        say(
            f"Note: it was trained on {base}, the registry's weights are {told['backbone']}; "
            "an adapter cannot tell whether these are the same."
        )
    if told["imported-statistics"] == STAND_IN:
        say(
            "Note: no images describe it. The rows of its classifier stand for them, and its "
            f"classes count as {counts_as} images each. Beside others, they may hardly be told "
            "apart: `fedcompo evaluate` shows it, and `--data` mends it."
        )
