"""The commands that look into a registry and change it: list, show, add, remove, verify."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedcompo import cli_print
from fedcompo.cli_common import (
    JsonOption,
    RegistryOption,
    VerboseOption,
    errors_as_sentences,
    open_registry,
    print_json,
    progress,
    registry_path,
    say,
    table_console,
)
from fedcompo.units import shortened, size

ClientArgument = Annotated[str, typer.Argument(help="Name of the client.")]


def list_clients(
    registry: RegistryOption = None, as_json: JsonOption = False, verbose: VerboseOption = False
) -> None:
    """List the clients of a registry, and what it composes."""
    with errors_as_sentences(verbose):
        opened = open_registry(registry)
        members = [cli_print.row(opened, member) for member in opened.state.members.values()]
        summary = {
            "registry": str(opened.path.absolute()),
            "backbone": opened.state.base,
            "root": opened.state.root,
            "settings": asdict(opened.settings),
            "model": str(opened.path.absolute() / opened.state.version) if members else None,
            "classes": list(opened.classes),
            "joint_head": "realigned" if opened.realigned else "aligned",
            "kept_versions": list(opened.state.kept),
            "clients": members,
        }
        if as_json:
            print_json(summary)
            return
        table = Table(title=f"Registry {opened.path}")
        for column in ("client", "kind", "classes", "added"):
            table.add_column(column)
        for column in ("images", "on disk", "shaped by", "shapes"):
            table.add_column(column, justify="right")
        for row in members:
            table.add_row(
                row["client"],
                row["kind"],
                shortened(row["classes"]),
                row["added"],
                str(row["num_examples"]),
                size(row["bytes"]),
                str(len(row["shaped_by"])),
                str(len(row["shapes"])),
            )
        table.caption = (
            "shaped by, shapes: clients it was trained with something of; clients trained with "
            "something of it"
        )
        table_console().print(table)
        say(f"Backbone {opened.state.base}")
        head = "features of the composed model" if opened.realigned else "pre-trained features"
        say(f"Joint head of {len(opened.classes)} classes, aligned on {head}")
        say(f"Model: {opened.path / 'model' if members else 'none, nobody is there'}")
        say(f"Root {opened.state.root}")


def show(
    client: ClientArgument,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Show all that is known of a client, also of one that was removed."""
    with errors_as_sentences(verbose):
        opened = open_registry(registry)
        history = cli_print.history(opened, client)
        present = client in opened.clients
        if not present and not history:
            opened.member(client)  # says who is there
        details: dict[str, Any] = {"client": client, "present": present, "history": history}
        if present:
            member = opened.member(client)
            details |= cli_print.row(opened, member) | {
                "folder": str(opened.path.absolute() / member.folder),
                "files": dict(member.files),
                "lineage": asdict(member.lineage),
                "settings": dict(opened.contribution(client).settings),
            }
        if as_json:
            print_json(details)
            return
        cli_print.print_details(details)


def add(
    folders: Annotated[list[Path], typer.Argument(help="Folders that hold one contribution each.")],
    registry: RegistryOption = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the place of clients of the same name.")
    ] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Add contributions that came by mail, from a bucket or on a disk; all of them or none."""
    with errors_as_sentences(verbose):
        opened = open_registry(registry)
        before = set(opened.clients)
        with progress(quiet=as_json) as tell:
            opened.add(*folders, replacing=replace, on_step=tell)
        added = sorted(set(opened.clients) - before)
        if as_json:
            print_json({"added": added, "clients": opened.clients, "root": opened.state.root})
            return
        say(f"The registry holds {', '.join(opened.clients)}. Root {opened.state.root}")


def remove(
    client: ClientArgument,
    registry: RegistryOption = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would go and what would stay; change nothing."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    requested_by: Annotated[str, typer.Option(help="On whose request; stands in the record.")] = "",
    reason: Annotated[str, typer.Option(help="Why; stands in the record.")] = "",
    keep_versions: Annotated[
        bool,
        typer.Option("--keep-versions", help="Keep earlier compositions that contain the client."),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images to measure the effect on, with --dry-run: digits, folder:<path>, "
            "npz:<path>; default: those the clients were trained on, where they are at hand."
        ),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Remove a client, exactly, and write a signed record of it.

    Its files, its term of the sum and its rows of the joint head go; the model is, bit for bit, the
    one that was never given the client. Nobody is trained again.
    """
    with errors_as_sentences(verbose):
        opened = open_registry(registry)
        plan = cli_print.plan(opened, client, keep_versions)
        if dry_run:
            with progress(quiet=as_json) as tell:
                from fedcompo.evaluation import effect_of_removal

                plan["accuracy"] = effect_of_removal(opened, client, data, tell)
        if not as_json:
            cli_print.print_plan(plan)
        if dry_run:
            if as_json:
                print_json(plan)
            return
        if not yes and not as_json:
            typer.confirm(f"Remove {client} from {opened.path}?", abort=True)
        started = time.monotonic()
        with progress(quiet=as_json) as tell:
            record = opened.remove(
                client,
                requested_by=requested_by,
                reason=reason,
                keep_versions=keep_versions,
                on_step=tell,
            )
        path = opened.path / opened.entries()[-1].details["record"]
        if as_json:
            say(record.text.rstrip())
            return
        say(f"Removed {client} in {time.monotonic() - started:.1f} s. Record: {path}")
        say(f"Check it by: fedcompo verify {path} --registry {opened.path}")


def verify(
    record: Annotated[
        Path | None, typer.Argument(help="A removal record; none: check the whole registry.")
    ] = None,
    registry: RegistryOption = None,
    public_key: Annotated[
        Path | None,
        typer.Option(help="Check the record's signature with this key, without the registry."),
    ] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Re-derive the claims of a removal record, or of a whole registry.

    Exits with 0 if every claim that can be derived again holds, with 1 if one does not.
    """
    with errors_as_sentences(verbose):
        from fedcompo.record_verification import verify_record
        from fedcompo.verification import verify_registry

        with progress(quiet=as_json) as tell:
            if record is None:
                findings = verify_registry(registry_path(registry), on_step=tell)
            else:
                alone = public_key is not None and registry is None
                findings = verify_record(
                    record,
                    registry=None if alone else open_registry(registry),
                    public_key=public_key,
                    on_step=tell,
                )
        if as_json:
            print_json([asdict(finding) for finding in findings])
        else:
            cli_print.print_findings(findings)
        if any(finding.holds is False for finding in findings):
            raise typer.Exit(1)
