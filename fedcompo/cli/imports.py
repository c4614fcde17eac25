"""The command that takes in models that were fine-tuned elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedcompo.cli.common import (
    JsonOption,
    RegistryOption,
    VerboseOption,
    errors_as_sentences,
    listed_names,
    open_registry,
    progress,
)
from fedcompo.report.console import print_json, say


def import_source(
    source: Annotated[Path, typer.Argument(help="A checkpoint, a folder of one, or of a LoRA.")],
    *,
    client: Annotated[str, typer.Option(help="Name of the contribution.")],
    data: Annotated[Path, typer.Option(help="Its images: train/<class>/*, to describe it by.")],
    registry: RegistryOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write a contribution's folder; add nothing."),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Names of the rows of its classifier, in their order."),
    ] = None,
    drop_rest: Annotated[
        bool,
        typer.Option("--drop-rest", help="Leave out what it changed beside the target weights."),
    ] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Make a client of a model that was fine-tuned elsewhere from the registry's weights.

    SOURCE is a checkpoint of timm (.safetensors, .pth), a folder that timm wrote, or a LoRA
    adapter's folder that PEFT wrote.
    """
    with errors_as_sentences(verbose):
        opened = open_registry(registry)
        from fedcompo.export.selection import new_folder
        from fedcompo.registry.imports import import_model
        from fedcompo.registry.registry import Registry

        with progress(quiet=as_json) as tell:
            made = import_model(
                source,
                opened,
                client=client,
                data=data,
                classes=listed_names(classes),
                drop_rest=drop_rest,
                on_step=tell,
            )
            if output is None:
                Registry(opened.path).add(made, on_step=tell)
            else:
                with new_folder(output) as folder:
                    made.save(folder)
        told = {"client": client, "output": str(output or opened.path), **made.settings}
        if as_json:
            print_json(told)
            return
        say(f"Imported {client} to {told['output']}; its head is {told['imported-head']}.")
        if told["imported-dropped"]:
            say(f"Left out: {told['imported-dropped']}.")
