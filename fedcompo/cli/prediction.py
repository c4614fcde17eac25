"""The command that predicts the classes of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from fedcompo.cli import common
from fedcompo.errors import ConfigError
from fedcompo.report.console import PlainConsole, numbers, print_csv, print_json, say, table_console
from fedcompo.report.progress import step
from fedcompo.storage.files import CONFIG, WEIGHTS


def predict(
    images: Annotated[list[Path], typer.Argument(help="Pictures, and folders of them.")],
    registry: common.RegistryOption = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Folder that compose or export wrote, in place of a registry."),
    ] = None,
    top: Annotated[
        int, typer.Option(min=1, help="Classes for each picture, the most probable first.")
    ] = 1,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, for programs.")] = False,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Predict the classes of pictures, by the pixels that timm computes.

    IMAGES are pictures, and folders of them, at any depth.

    Pictures that cannot be read are named; the others are predicted, and the exit code is 1. As in
    training, pictures are turned upright, as their EXIF tag says.
    """
    with common.errors_as_sentences(verbose), common.progress(quiet=as_json):
        if (registry is not None and model is not None) or (as_csv and as_json):
            raise ConfigError(
                "Give one of `--registry` and `--model`, and of `--csv` and `--json`."
            )
        if model is not None and not all((model / file).is_file() for file in (CONFIG, WEIGHTS)):
            raise ConfigError(f"{model} is no model: it needs the files {CONFIG} and {WEIGHTS}.")
        source = common.open_registry(registry) if model is None else model
        from fedcompo.export import prediction

        step("loading the model")
        net = prediction.model_from(source)
        rows, unreadable = prediction.predict(net, images, top=top)
    if as_json:
        print_json({"predictions": rows, "unreadable": unreadable})
    elif as_csv:
        print_csv(["file", "class", "probability"], rows)
    elif rows:
        table = Table(Column("file", overflow="fold"), "class", *numbers("probability"))
        for row in rows:
            table.add_row(row["file"], row["class"], f"{row['probability']:.4f}")
        table_console().print(table)
    for file, reason in unreadable.items():
        say(f"{file} cannot be read: {reason}", PlainConsole(stderr=True))
    if unreadable:
        raise typer.Exit(1)
