"""The command that measures whether a model forgets a client."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from fedcompo.cli import common
from fedcompo.report.console import print_json, say
from fedcompo.report.units import duration


def audit(
    remove: Annotated[
        str, typer.Option(metavar="CLIENT", help="Client whose removal is measured; it stays.")
    ],
    registry: common.RegistryOption = None,
    data: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="The clients' images: digits, folder:<path>, npz:<path>; default: those that "
            "they were trained on.",
        ),
    ] = "",
    gold: Annotated[
        Path | None,
        typer.Option(
            metavar="REGISTRY",
            help="Registry of the same run without the client (`--set exclude=CLIENT`).",
        ),
    ] = None,
    repaired: Annotated[
        Path | None,
        typer.Option(
            metavar="REGISTRY",
            help="Copy of the registry after a removal with `repair-rounds`: does it come back?",
        ),
    ] = None,
    shadows: Annotated[
        int,
        typer.Option(
            help="Shadow models of the likelihood-ratio attack: an even number, at least 4."
        ),
    ] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Seed of shadows and intervals.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write to, new; default: ./audit-CLIENT."),
    ] = None,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Measure whether the model forgets a client that is taken out of it; changes nothing.

    Compares the composition before and after a removal and, with --gold, one that the client never
    took part in: accuracy on everyone's test images, how well two attacks tell the client's
    training images from its test images, how fast a linear probe learns its task again, and how
    alike the models see its images. With --repaired also whether it comes back.

    Writes audit.json and audit.md. The shadow models take as long as that many trainings of the
    client.
    """
    with common.errors_as_sentences(verbose):
        started = time.monotonic()
        opened = common.open_registry(registry)
        opened.member(remove)  # refuses at once who is not there
        from fedcompo.audit.measure import audit as measure
        from fedcompo.audit.report import print_audit, write_audit
        from fedcompo.export.selection import new_folder
        from fedcompo.registry.reader import RegistryReader

        folder = output or Path(f"audit-{remove}")
        with new_folder(folder) as draft, common.progress(quiet=as_json):
            values = measure(
                opened,
                remove,
                data=data,
                gold=RegistryReader(gold) if gold else None,
                repaired=RegistryReader(repaired) if repaired else None,
                shadows=shadows,
                seed=seed,
            )
            write_audit(draft, values)
        if as_json:
            print_json(values)
            return
        print_audit(values)
        say(f"Measured in {duration(time.monotonic() - started)}: {folder}")
