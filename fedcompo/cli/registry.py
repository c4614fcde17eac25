"""The commands that make a registry, look into it and change it."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcompo.cli import common, tables
from fedcompo.config.run import RunConfig
from fedcompo.config.scenario import settings_of
from fedcompo.errors import ConfigError
from fedcompo.names import require_utf8
from fedcompo.report.console import print_json, say
from fedcompo.report.newcomers import note_on_newcomers
from fedcompo.report.progress import step
from fedcompo.report.units import listed

if TYPE_CHECKING:
    from fedcompo.registry.reader import RegistryReader

NO_DATA = "none"
"""Value of ``--data``: measure nothing."""
ClientArgument = Annotated[str, typer.Argument(help="Name of the client.")]


def create(
    folder: Annotated[Path, typer.Argument(help="Folder to make; must be new or empty.")],
    assignments: common.AssignmentsOption = None,
    signing_key: common.SigningKeyOption = None,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Make an empty registry, to `import`, `fit` and `add` to, or for runs to join.

    Its backbone and its way to compose are settings, and stay:

    fedcompo create R --set backbone=deit_tiny_patch16_224 --set checkpoint=deit.safetensors
    """
    with common.errors_as_sentences(verbose):
        config = RunConfig.parse(settings_of(None, assignments or [], {}))
        from fedcompo.backbone.backbone import load_backbone
        from fedcompo.composition.settings import CompositionSettings
        from fedcompo.registry.registry import Registry
        from fedcompo.registry.signing import PUBLIC, fingerprint_of

        with common.progress(quiet=as_json):
            step("loading the backbone")
            backbone = load_backbone(config.backbone)
            settings = CompositionSettings.of(config)
            made = Registry.create(folder, backbone, settings, key=signing_key)
        key = fingerprint_of((made.path / PUBLIC).read_bytes())
        if as_json:
            about = {"registry": str(folder.absolute()), "backbone": backbone.fingerprint}
            print_json({**about, "key": key})
            return
        say(f"Made {folder}, of nobody yet, on {backbone.fingerprint}.")
        say(f"It signs by the key SHA-256 {key}")
        say(f"Next: fedcompo import SOURCE --client NAME --registry {folder}")


def list_clients(
    registry: common.RegistryOption = None,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """List the clients of a registry, and what it composes."""
    with common.errors_as_sentences(verbose):
        from fedcompo.registry.inspection import summary

        values = summary(common.open_registry(registry))
        if as_json:
            print_json(values)
        else:
            tables.print_list(values)


def show(
    client: ClientArgument,
    registry: common.RegistryOption = None,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Show all that is known of a client, also of one that was removed.

    CLIENT is its name; `fedcompo list` lists them.
    """
    with common.errors_as_sentences(verbose):
        from fedcompo.registry.inspection import details

        values = details(common.open_registry(registry), client)
        if as_json:
            print_json(values)
            return
        tables.print_details(values)


def add(
    folders: Annotated[list[Path], typer.Argument(help="Folders that hold one contribution each.")],
    registry: common.RegistryOption = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the place of clients of the same name.")
    ] = False,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Add contributions that came by mail, from a bucket or on a disk; all of them or none.

    FOLDERS hold one contribution each. Every byte is checked before anything changes.
    """
    with common.errors_as_sentences(verbose):
        path = common.open_registry(registry).path  # refuses at once where there is none
        from fedcompo.registry.registry import Registry

        opened = Registry(path)
        before = opened.clients
        with common.progress(quiet=as_json):
            opened.add(*folders, replacing=replace)
        new = [member["client"] for member in opened.entries()[-1].details["clients"]]
        summary = {
            "added": [client for client in new if client not in before],
            "replaced": [client for client in new if client in before],
            "clients": opened.clients,
            "root": opened.state.root,
        }
        if as_json:
            print_json(summary)
            return
        for what in ("added", "replaced"):
            if summary[what]:
                say(f"{what.capitalize()} {listed(summary[what])}.")
        arrivals = ((m.added, m.client, m.classes) for m in opened.state.members.values())
        if note := note_on_newcomers(arrivals, new):
            say(f"Note: {note}")
        say(f"{len(opened.clients)} clients, {len(opened.classes)} classes. Root {summary['root']}")


def remove(
    client: ClientArgument,
    registry: common.RegistryOption = None,
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
            "npz:<path>, or none to measure nothing; default: those the clients were trained on, "
            "where they are at hand."
        ),
    ] = None,
    signing_key: common.SigningKeyOption = None,
    as_json: common.JsonOption = False,
    verbose: common.VerboseOption = False,
) -> None:
    """Remove a client, exactly, and write a signed record of it.

    CLIENT is its name; `fedcompo list` lists them. Of a client with several tasks or shards,
    members CLIENT.task-0 or CLIENT.shard-0 and so on, all are removed, each with a record of its
    own; CLIENT.shard-2 removes that shard alone.

    Its files, its term of the sum and its rows of the joint head go.

    The model is, bit for bit, the one that was never given it. Nobody is trained again.
    """
    with common.errors_as_sentences(verbose):
        from fedcompo.data.tasks import members_of
        from fedcompo.registry.inspection import removal_plan

        _check_options(dry_run=dry_run, yes=yes, as_json=as_json, data=data)
        require_utf8(requested_by, reason)
        opened = common.open_registry(registry)
        members = members_of(client, opened.clients) or (client,)
        plans = [removal_plan(opened, member, keep_versions=keep_versions) for member in members]
        if not as_json:
            if len(members) > 1:
                say(
                    f"{client} has {len(members)} members; each is removed by itself, so what is "
                    "said of one counts the others among those who stay and who train again."
                )
            for plan in plans:
                tables.print_plan(plan, realigned=opened.realigned)
        if dry_run:
            _preview(opened, plans, data, as_json)
            return
        if not yes:
            common.confirm(f"Remove {listed(members)} from {opened.path}?")
        from fedcompo.registry.registry import Registry

        changed, records = Registry(opened.path), []
        for member in members:
            started = time.monotonic()
            with common.progress(quiet=as_json):
                record = changed.remove(
                    member,
                    requested_by=requested_by,
                    reason=reason,
                    keep_versions=keep_versions,
                    key=signing_key,
                )
            records.append(record)
            if not as_json:
                path = changed.path / record.place
                check = ["fedcompo", "verify", str(path), "--registry", str(changed.path)]
                say(f"Removed {member} in {time.monotonic() - started:.1f} s. Record: {path}")
                say(f"Check it by: {shlex.join(check)}")
        if as_json and len(records) == 1:
            typer.echo(records[0].text, nl=False)  # byte for byte: it can be kept and verified
        elif as_json:
            print_json([json.loads(record.text) for record in records])


def _preview(
    registry: RegistryReader, plans: Sequence[Mapping[str, Any]], data: str | None, as_json: bool
) -> None:
    """End a dry run: measure the effect on accuracy, unless that is not wanted."""
    members, told = [plan["client"] for plan in plans], [dict(plan) for plan in plans]
    if data != NO_DATA:
        from fedcompo.audit.evaluation import effect_of_removal

        with common.progress(quiet=as_json):
            effect = effect_of_removal(registry, members, data)
        told = [{**plan, "accuracy": effect} for plan in told]
        if not as_json:
            tables.print_effect(effect)
    if as_json:
        print_json(told if len(told) > 1 else told[0])


def _check_options(*, dry_run: bool, yes: bool, as_json: bool, data: str | None) -> None:
    """Refuse options that would have no effect, and questions that nobody would see."""
    if data is not None and not dry_run:
        raise ConfigError("`--data` is what --dry-run measures on. Add --dry-run, or leave it out.")
    if as_json and not (yes or dry_run):
        raise ConfigError("With --json nobody is asked: add --yes to remove, or --dry-run to see.")
