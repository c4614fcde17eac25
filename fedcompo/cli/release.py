"""The command that publishes a registry's model without laying a client bare."""

from __future__ import annotations

from typing import Annotated

import typer

from fedcompo.cli import common
from fedcompo.cli.models import report
from fedcompo.report.console import say
from fedcompo.report.progress import step


def release(
    *,
    output: common.OutputOption,
    registry: common.RegistryOption = None,
    every: Annotated[
        str,
        typer.Option(
            metavar="N|Nd",
            help="From now on, release after N changes of clients, or N days, and not before. "
            "Default: as the last release says.",
        ),
    ] = "",
    reveal: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Clients whom this release may lay bare."),
    ] = None,
    signing_key: common.SigningKeyOption = None,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Write the model of everyone for the public, as a folder for timm, and note it in the journal.

    Two versions that differ by one client give away what that client sent: whoever has both
    subtracts. So a release is refused if it, together with all earlier ones, would lay a client
    bare. Beside the model lies release.json, which the registry signs.

    Models that `compose` and `export` write are not looked at.
    """
    with common.errors_as_sentences(verbose), common.progress(quiet=as_json):
        named = common.listed_names(reveal)
        opened = common.open_registry(registry)
        from fedcompo.export import release as releases

        step("reading")
        written = releases.release(opened, output, every=every, reveal=named, key=signing_key)
        report(written, as_json)
        if not as_json:
            same = "The same bits as at" if written["again"] else "Released:"
            say(f"{same} line {written['line']} of the journal of {opened.path}.")
