"""The command that hands models on: `fedcompo export`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fedcompo.cli import common
from fedcompo.cli.models import report, say_members
from fedcompo.cli.report import results_beside
from fedcompo.composition.settings import MEAN
from fedcompo.errors import ConfigError
from fedcompo.names import require_utf8
from fedcompo.report.console import print_json, say
from fedcompo.report.progress import step


@common.with_options("choice", common.RuledChoice)
def export(
    *,
    output: common.OutputOption,
    registry: common.RegistryOption = None,
    client: Annotated[
        str | None,
        typer.Option(help="One client, with its own head, as an adapter that PEFT loads."),
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write one LoRA adapter that PEFT loads.")
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Largest rank of the adapter; default: whatever is exact."),
    ] = None,
    egress: Annotated[
        bool,
        typer.Option(
            "--egress", help="With receipts, egress.json and a page that a data controller signs."
        ),
    ] = False,
    audits: Annotated[
        list[Path] | None,
        typer.Option("--audit", help="With --egress: an audit.json, or its folder. Repeatable."),
    ] = None,
    licence: Annotated[
        str, typer.Option(metavar="TEXT", help="With --egress: licence of the members' data.")
    ] = "",
    choice: common.RuledChoice,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Export the composed model for timm, or as one LoRA adapter for PEFT.

    With --egress also what a data controller signs before the model leaves: whose data, how many
    images, what noise, which attacks were tried, receipts, limits. `fedcompo verify
    DIR/egress.json` checks it.

    An adapter joins the factors of the members: it makes the composed model, to rounding. --rank
    cuts it, and tells the error; members without factors (full, ia3) need it. It is three times as
    large for a fused qkv, as in training.
    """
    with common.errors_as_sentences(verbose), common.progress(quiet=as_json):
        chosen = choice.parsed()
        if client is not None and choice != common.RuledChoice():
            raise ConfigError("`--client` takes one client as it is; to compose, use `--only`.")
        if rank is not None and not adapter and client is None:
            raise ConfigError("`--rank` goes with `--adapter` or `--client`.")
        if egress and (adapter or client is not None):
            raise ConfigError(
                "`--egress` is of a composed model: leave out --adapter and --client."
            )
        if not egress and (audits or licence):
            raise ConfigError("`--audit` and `--licence` go with `--egress`.")
        require_utf8(licence)
        opened = common.open_registry(registry)
        if client is not None:
            opened.member(client)  # refuses at once who is not there
            chosen |= {"only": (client,), "weights": {client: 1.0}, "scale": 1.0, "rule": MEAN}
        from fedcompo.export.folder import publish
        from fedcompo.export.selection import from_registry

        selection = from_registry(opened, **chosen)
        if client is not None:
            selection = replace(selection, head=opened.contribution(client).head)
        step("writing")
        if egress:
            from fedcompo.export.egress import statement
            from fedcompo.export.pack import write_pack

            beside = results_beside(opened.path)
            stated = statement(
                opened, selection, audits=audits or (), licence=licence, results=beside
            )
            written = publish(
                output, selection, sealing=lambda at, _: write_pack(at, opened, stated)
            )
            report(written, as_json)
        elif client is None and not adapter:
            report(publish(output, selection), as_json)
        else:
            from fedcompo.export.peft import export_peft

            written = export_peft(output, selection, rank=rank)
            _report_adapter({**written, "client": client}, as_json)


def _report_adapter(written: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(written)
        return
    say_members(written)
    ranks, worst = sorted({*written["ranks"].values()}), written["worst"]
    spread = " to ".join(map(str, ranks[:: max(1, len(ranks) - 1)]))
    say(f"LoRA adapter for PEFT, of rank {spread}: {written['output']}")
    say(
        f"Error, relative to the composed change: {written['error']:.3g} in all; "
        f"{worst['error']:.3g} at most, in {worst['weight']}."
        if worst["error"]
        else "It is the composed change, to float32's rounding."
    )
