"""What the registry's commands say, as values for programs and as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from fedcompo.cli_common import say, table_console
from fedcompo.units import percent, size

if TYPE_CHECKING:
    from fedcompo.registry import Registry
    from fedcompo.registry_state import Member
    from fedcompo.verification import Finding

UNALTERED = " is unaltered"
"""End of the claims about single files; those that hold are counted."""
MARKS = {True: ("holds", "green"), False: ("FAILS", "bold red"), None: ("open", "yellow")}


def row(registry: Registry, member: Member) -> dict[str, Any]:
    """What a list says of a member."""
    lineage = member.lineage
    shaped_by = sorted({*lineage.anchored_by, *lineage.aligned_with, *lineage.ensemble})
    entry = registry.entries()[member.added - 1]
    return {
        "client": member.client,
        "kind": member.kind,
        "classes": list(member.classes),
        "num_examples": member.num_examples,
        "bytes": _bytes(registry, member),
        "added": entry.time,
        "shaped_by": shaped_by,
        "shapes": list(registry.influence_of(member.client).to_retrain),
    }


def history(registry: Registry, client: str) -> list[dict[str, Any]]:
    """What the journal tells of a client."""
    told = []
    for entry in registry.entries():
        names = [m["client"] for m in entry.details.get("clients", ()) if isinstance(m, dict)]
        if client in (*names, entry.details.get("client")):
            told.append(
                {
                    "sequence": entry.sequence,
                    "time": entry.time,
                    "event": entry.event,
                    **{k: v for k, v in entry.details.items() if k in ("record", "within")},
                }
            )
    return told


def print_details(details: Mapping[str, Any]) -> None:
    """Print what is known of one client."""
    table = Table(show_header=False, title=details["client"])
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    if details["present"]:
        lineage = details["lineage"]
        lines = {
            "kind": details["kind"],
            "classes": ", ".join(details["classes"]),
            "images": str(details["num_examples"]),
            "folder": f"{details['folder']}, {size(details['bytes'])}",
            "method": lineage["method"],
            "anchored by": ", ".join(lineage["anchored_by"]) or "nobody",
            "head aligned with": ", ".join(lineage["aligned_with"]) or "nobody",
            "trained inside": ", ".join(lineage["ensemble"]) or "no ensemble",
            "something of it in": ", ".join(details["shapes"]) or "nobody",
        }
        lines |= {f"SHA-256 of {file}": digest for file, digest in details["files"].items()}
    else:
        lines = {"": "is not in the registry any more"}
    for event in details["history"]:
        more = f", record {event['record']}" if "record" in event else ""
        lines[f"line {event['sequence']}"] = f"{event['event']}, {event['time']}{more}"
    for name, value in lines.items():
        table.add_row(name, Text(value))
    table_console().print(table)


def plan(registry: Registry, client: str, keep_versions: bool) -> dict[str, Any]:
    """What a removal would do."""
    member = registry.member(client)
    survivors = [name for name in registry.clients if name != client]
    staying = {name for c in survivors for name in registry.state.members[c].classes}
    old = [f for f, kept in registry.state.kept.items() if client in kept["clients"]]
    influence = registry.influence_of(client)
    return {
        "client": client,
        "goes": {
            "folder": member.folder,
            "bytes": _bytes(registry, member),
            "task_vector": member.kind,
            "classes": [name for name in member.classes if name not in staying],
            "versions": [registry.state.version, *([] if keep_versions else old)],
        },
        "stays": {
            "clients": survivors,
            "classes": sorted(staying),
            "versions": old if keep_versions else [],
        },
        "composition_exact": True,
        "influence_exact": influence.exact,
        "lineage": asdict(influence),
        "to_retrain": list(influence.to_retrain),
    }


def print_plan(plan: Mapping[str, Any]) -> None:
    """Say what a removal does, and what it cannot do."""
    goes, stays, lineage = plan["goes"], plan["stays"], plan["lineage"]
    client = plan["client"]
    say(f"Goes:  {goes['folder']} ({size(goes['bytes'])}), its term of the sum")
    classes = ", ".join(goes["classes"]) or "none, others own them too"
    say(f"       classes of the joint head: {classes}")
    say(f"       compositions that contain it: {', '.join(goes['versions'])}")
    say(f"Stays: {', '.join(stays['clients']) or 'nobody'}")
    if stays["versions"]:
        say(f"       compositions that contain it, as asked: {', '.join(stays['versions'])}")
    say("The model will be, bit for bit, the one that was never given this client.")
    if plan["influence_exact"]:
        say(f"No other client was trained with anything of {client}: nothing of it is left.")
    else:
        say(f"What cannot be undone: others were trained with something of {client}.")
        for what, part in (
            ("anchored by its Fisher", "fisher"),
            ("started from a head aligned with its statistics", "statistics"),
            ("trained inside a model that held it", "ensemble"),
            ("indirectly, through others", "indirect"),
        ):
            if lineage[part]:
                say(f"  {what}: {', '.join(lineage[part])}")
        say(f"  To undo that too, train again: {', '.join(plan['to_retrain'])}")
    if plan.get("accuracy"):
        _print_effect(plan["accuracy"])


def print_findings(findings: Sequence[Finding]) -> None:
    """Print each claim and whether it holds; details below."""
    table = Table("claim", "", title="Derived again")
    whole = [f for f in findings if f.holds and f.claim.endswith(UNALTERED)]
    for finding in findings:
        if finding not in whole:
            mark, style = MARKS[finding.holds]
            table.add_row(Text(finding.claim), Text(mark, style=style))
    if whole:
        mark, style = MARKS[True]
        table.add_row(f"{len(whole)} files are unaltered", Text(mark, style=style))
    table_console().print(table)
    for finding in findings:
        if not finding.holds:
            mark, _ = MARKS[finding.holds]
            say(f"{mark}: {finding.claim}: {finding.detail}")
    failed = sum(finding.holds is False for finding in findings)
    opened = sum(finding.holds is None for finding in findings)
    say(
        f"{len(findings) - failed - opened} of {len(findings)} claims hold, {failed} fail, "
        f"{opened} cannot be derived again."
    )


def print_accuracies(title: str, figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Print accuracy by client, %."""
    table = Table(title=title)
    table.add_column("client")
    for name in ("images", "class-IL", "task-IL"):
        table.add_column(name, justify="right")
    for client, own in figures.items():
        table.add_row(
            Text(client),
            str(own["num_examples"]),
            percent(own["class_il_accuracy"]),
            percent(own["task_il_accuracy"]),
        )
    table_console().print(table)


def print_removal(results: Mapping[str, Any]) -> None:
    """Print what a removal over Flower reports."""
    say(f"Removed {results['removed']}; {', '.join(results['survivors']) or 'nobody'} stay.")
    _print_effect({"before": results["accuracy_before"], "after": results["accuracy_after"]})
    if results["to_retrain"]:
        say(
            "Composition-exact, not influence-exact: trained with something of "
            f"{results['removed']} were {', '.join(results['to_retrain'])}."
        )
    for note in results["notes"]:
        say(f"Note: {note}")
    say(f"Record: {results['record']}")


def _print_effect(accuracy: Mapping[str, Any]) -> None:
    if "reason" in accuracy:
        say(f"Its effect on accuracy was not measured: {accuracy['reason']}")
        return
    table = Table(title="Accuracy, %, before and after")
    table.add_column("client")
    for name in ("images", "class-IL", "after", "task-IL", "after"):
        table.add_column(name, justify="right")
    for client, before in accuracy["before"].items():
        after = accuracy["after"].get(client, {})
        table.add_row(
            Text(client),
            str(before["num_examples"]),
            percent(before["class_il_accuracy"]),
            percent(after.get("class_il_accuracy")),
            percent(before["task_il_accuracy"]),
            percent(after.get("task_il_accuracy")),
        )
    table_console().print(table)


def _bytes(registry: Registry, member: Member) -> int:
    folder = registry.path / member.folder
    return sum((folder / file).stat().st_size for file in member.files)
