"""The command that fits one client's contribution on this machine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from fedcompo.cli import common
from fedcompo.config.scenario import settings_of
from fedcompo.report.console import print_json, say
from fedcompo.report.units import listed, percent


def fit(
    data: Annotated[
        Path,
        typer.Option(
            help="Folder of images: train/<class>/* and perhaps test/<class>/*, or <class>/*. Or "
            "a manifest (.csv, .parquet), .npz or .jsonl."
        ),
    ],
    output: common.OutputOption,
    registry: Annotated[
        Path | None,
        typer.Option(
            "--registry",
            "-r",
            help="Registry to join: its backbone, settings and members; it is only read. Default: "
            "none, and the backbone of the settings.",
        ),
    ] = None,
    client: Annotated[str, typer.Option(help="The client's name; default: that of --data.")] = "",
    assignments: common.AssignmentsOption = None,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Fit one client's contribution to a folder of images on this machine; no server, no engine.

    With --registry, the bits are those of a run in which this client alone joins the registry. With
    `--set shards=4 --client NAME.shard-2` it fits that shard, as the map of NAME says.

    Then: fedcompo add DIR --registry R, fedcompo publish DIR, or fedcompo compose DIR OTHERS
    """
    with common.errors_as_sentences(verbose), common.progress(quiet=as_json):
        settings = settings_of(None, assignments or [], {})
        path = None if registry is None else common.open_registry(registry).path
        from unittest.mock import patch

        from fedcompo.engine.alone import fit_alone
        from fedcompo.export.selection import new_folder

        flower = logging.getLogger("flwr")
        quiet = patch.object(flower, "disabled", not verbose)  # the notes come below
        with quiet, new_folder(output) as folder:
            made = fit_alone(data, folder, settings, registry=path, client=client)
    if as_json:
        print_json({"output": str(output.absolute()), **made})
        return
    classes, others = made["classes"], made["others"]
    say(
        f"Fitted {made['client']} ({made['kind']}) to {made['num_examples']} images of "
        f"{len(classes)} classes: {listed(classes)}."
    )
    say(
        f"Accuracy among its own classes: {percent(made['own_task_accuracy'])} % of "
        f"{made['num_test_examples']} test images."
    )
    if others:
        say(f"In the company of {listed(others)}.")
    for note in made["notes"]:
        say(f"Note: {note}")
    say(f"Contribution: {output}")
    also = "" if path else f", or fedcompo compose {output} OTHERS -o MODEL"
    say(f"Next: fedcompo add {output} --registry {path or 'R'}, or fedcompo publish {output}{also}")
