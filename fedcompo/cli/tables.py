"""Prints what the registry's commands say, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table
from rich.text import Text

from fedcompo.config.presets import IMPORTED
from fedcompo.names import printable
from fedcompo.registry.removal import REVEALS, RemovalRecord
from fedcompo.report.confusion import worst_line
from fedcompo.report.console import numbers, say, table_console
from fedcompo.report.newcomers import note_on_newcomers
from fedcompo.report.twins import note_on, twins
from fedcompo.report.units import (
    ALL_CLASSES,
    BRACKETS,
    EXPLAINED,
    OWN_CLASSES,
    SMALL,
    listed,
    percent,
    percent_between,
    shortened,
    size,
)

if TYPE_CHECKING:
    from fedcompo.registry.rederivation import Finding

CHOSEN_BY = {
    "fixed": "as set",
    "vote": "as the clients voted; the factor on the sum stays when members change",
    "rule": "as the rule says",
    "norms": "which keeps the length of the task vectors",
}
"""What is said of a scale, by where it comes from."""
UNALTERED = " is unaltered"
"""End of the claims about single files; those that hold are counted."""
MARKS = {True: ("holds", "green"), False: ("FAILS", "bold red"), None: ("open", "yellow")}


def print_list(summary: Mapping[str, Any]) -> None:
    """Print who is in a registry, and what it composes."""
    client, added = Column("client", no_wrap=True), Column("added", no_wrap=True)
    counted = numbers("images", "size", "shaped by", "shapes")
    title = f"Registry {summary['registry']}"
    table = Table(client, "kind", "classes", added, *counted, title=title)
    for row in summary["clients"]:
        table.add_row(
            row["client"],
            row["kind"],
            shortened(row["classes"]),
            row["added"].partition("T")[0],  # the day is enough, and fits a narrow terminal
            "none" if row["stand_in"] else str(row["num_examples"]),
            size(row["bytes"]),
            str(len(row["shaped_by"])),
            str(len(row["shapes"])),
        )
    table_console().print(table)
    for row in summary["clients"]:
        if fault := row.get("fault"):
            say(f"{row['client']} cannot be described ({fault}); see `fedcompo verify`.")
    say(
        "shaped by: number of clients whose data shaped its training. shapes: number of members "
        "whose training its data shaped. `fedcompo show CLIENT` names them."
    )
    if made := [row["client"] for row in summary["clients"] if row["stand_in"]]:
        say(f"No images describe {listed(made)}: the rows of their classifiers stand for them.")
    aligned = "composed" if summary["joint_head"] == "realigned" else "pre-trained"
    say(f"Backbone {summary['backbone']}")
    if summary["old_pixels"]:
        say("Pictures are resized as by earlier versions, whose roundings are not quite timm's.")
    say(f"Joint head of {len(summary['classes'])} classes, aligned on {aligned} features")
    _say_notes((row["line"], row["client"], row["classes"]) for row in summary["clients"])
    if summary["clients"]:
        one, every = (summary["settings"].get(f"{cap}_cap") for cap in ("class", "client"))
        capped = f"for at most {one} images of a class, {every} in all"
        say(f"A client counts {capped if one else 'for all its images'}")
        if rule := summary["settings"].get("rule"):
            say(f"Rule {rule}")
        say(f"Scale λ = {summary['scale']:.4g}, {CHOSEN_BY[summary['factor_by']]}")
    say(f"Model: {summary['model'] or 'none, nobody is there'}")
    if last := summary["release"]:
        say(
            f"Released last: line {last['line']} of the journal, {last['time']}. Changed since: "
            f"{listed(last['changed_since']) or 'nobody'}"
            + (f"; a release every {last['every']}" if last["every"] else "")
        )
    say(f"Root {summary['root']}")


def print_members(
    server: str, root: str, members: Sequence[Mapping[str, Any]], *, key: str
) -> None:
    """Print who is in a registry that is served elsewhere, and its key's fingerprint."""
    client, title = Column("client", no_wrap=True), f"Registry at {server}"
    table = Table(client, "kind", "classes", *numbers("images"), title=title)
    for member in members:
        table.add_row(
            member["client"],
            printable(member["kind"]),
            shortened(member["classes"]),
            str(member["num_examples"]),
        )
    table_console().print(table)
    _say_notes((m["added"], m["client"], m["classes"]) for m in members)
    say(f"Root {root}")
    say(f"Its key has SHA-256 {key}")


def _say_notes(arrivals: Iterable[tuple[int, str, Sequence[str]]]) -> None:
    """Say which shards a client has, which classes may be one, and who came to another's."""
    from fedcompo.data.tasks import shard_of, whole_of

    came = list(arrivals)
    shards = sorted((whole_of(m), n) for _, m, _ in came if (n := shard_of(m)) is not None)
    for client, own in groupby(shards, key=itemgetter(0)):
        say(f"Shards of {client}: {listed(str(number) for _, number in own)}.")
    alike = note_on(twins({client: classes for _, client, classes in came}))
    for note in filter(None, (alike, note_on_newcomers(came))):
        say(f"Note: {note}")


def print_details(details: Mapping[str, Any]) -> None:
    """Print what is known of one client."""
    table = Table(show_header=False, title=details["client"])
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    if details["present"]:
        lineage = details["lineage"]
        lines = {
            "kind": details["kind"],
            "classes": listed(details["classes"]),
            "images": f"none; counts as {details['num_examples']}"
            if details["stand_in"]
            else str(details["num_examples"]),
            "folder": f"{details['folder']}, {size(details['bytes'])}",
            "method": lineage["method"],
            "anchored by": listed(lineage["anchored_by"]) or "nobody",
            "head aligned with": listed(lineage["aligned_with"]) or "nobody",
            "trained inside": listed(lineage["ensemble"]) or "no ensemble",
            "its data shaped": listed(details["shapes"]) or "nobody",
        }
        imported = {k: str(v) for k, v in details["settings"].items() if k.startswith(IMPORTED)}
        lines |= {key.replace("-", " "): value or "nothing" for key, value in imported.items()}
        lines |= {f"SHA-256 of {file}": digest for file, digest in details["files"].items()}
    else:
        lines = {"in the registry": "not any more"}
    for event in details["history"]:
        more = f", record {event['record']}" if "record" in event else ""
        more += ", to be replaced" if "within" in event else ""
        lines[f"journal, line {event['sequence']}"] = f"{event['event']}, {event['time']}{more}"
    for name, value in lines.items():
        table.add_row(name, value)
    table_console().print(table)


def print_plan(plan: Mapping[str, Any], *, realigned: bool = False) -> None:
    """Print what a removal deletes, what it keeps, and what it cannot undo.

    Realigned: the present joint head was fitted to the composed model's features.
    """
    goes, stays, lineage = plan["goes"], plan["stays"], plan["lineage"]
    client = plan["client"]
    say(f"Goes:  {goes['folder']} ({size(goes['bytes'])}), its term of the sum")
    classes = listed(goes["classes"]) or "none, others own them too"
    say(f"       classes of the joint head: {classes}")
    if goes["versions"]:
        say(f"       compositions that contain it: {', '.join(goes['versions'])}")
    say(f"Stays: {listed(stays['clients']) or 'nobody'}")
    if stays["versions"]:
        say(f"       compositions that contain it, as asked: {', '.join(stays['versions'])}")
    say("The model will be, bit for bit, the one that was never given this client.")
    if realigned and stays["clients"]:
        say(
            "Its head falls back to pre-trained features, and accuracy with it, until those who "
            "stay align it again: remove by a run (`action = remove`), or start one later."
        )
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
                say(f"  {what}: {listed(lineage[part])}")
        say(f"  To undo that too, train again: {listed(plan['to_retrain'])}")
    if stays["clients"]:
        say(REVEALS)


def print_findings(findings: Sequence[Finding]) -> None:
    """Print each claim and whether it holds, then the details of those that do not."""
    table = Table("claim", "derived again")
    whole = [f for f in findings if f.holds and f.claim.endswith(UNALTERED)]
    for finding in findings:
        if finding not in whole:
            table.add_row(finding.claim, Text(*MARKS[finding.holds]))
    if whole:
        table.add_row(f"{len(whole)} files are unaltered", Text(*MARKS[True]))
    table_console().print(table)
    for finding in findings:
        if not finding.holds:
            say(f"{MARKS[finding.holds][0]}: {finding.claim}: {finding.detail}")
    failed, opened = (sum(f.holds is mark for f in findings) for mark in (False, None))
    held = f"{len(findings) - failed - opened} of {len(findings)} claims hold"
    fails = f"{failed} fail{'s' * (failed == 1)}"
    say(f"{held}, {fails}, {opened} cannot be derived again from what is at hand.")


def print_record(record: RemovalRecord) -> None:
    """Print what a signed record of a removal says, what that proves, and what it does not."""
    reason = f": {record.reason}" if record.reason else ""
    own = f"a {record.kind} task vector of {record.num_examples} images"
    kept = f"; asked to be kept, models that contain it: {', '.join(record.kept_versions)}"
    for what, told in (
        ("who", f"{record.client}, {own}; classes {listed(record.classes)}"),
        ("when", f"{record.time}, as line {record.sequence} of the journal"),
        ("where", f"the registry {record.registry}"),
        ("asked by", (record.requested_by or "not said") + reason),
        ("deleted", listed(record.removed_files) + kept * bool(record.kept_versions)),
        ("stays", listed(record.survivors) or "nobody"),
        ("still influenced", listed(record.influence.to_retrain) or "nobody: influence-exact"),
        ("root after", record.root_after),
    ):
        say(f"{what + ':':<18}{told}")
    say(
        "This proves that who holds the key has stated it, and that nobody has changed it since. "
        "It does not prove that it was done: verify it with the registry, or ask who runs that to."
    )
    say(f"{record.limits} {record.reveals}")


def print_accuracies(figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Print accuracy by client, %."""
    few = any(own["num_examples"] < SMALL for own in figures.values())
    caption = f"{BRACKETS}\n{EXPLAINED}" if few else EXPLAINED
    table = _accuracies("Accuracy, %", caption, ALL_CLASSES, OWN_CLASSES)
    for client, own in figures.items():
        table.add_row(
            client,
            str(own["num_examples"]),
            percent_between(own["class_il_accuracy"], own["interval"], own["num_examples"]),
            percent(own["task_il_accuracy"]),
        )
    table_console().print(table)


def print_worst_classes(results: Mapping[str, Any]) -> None:
    """Print calibration, and the classes recognised worst with what they are mistaken for."""
    error = percent(results["calibration"]["error"])
    say(f"Calibration error {error} %: how far confidence and accuracy are apart, all classes.")
    say(worst_line(results) or "No image is mistaken for one of another class.")


def print_removal(results: Mapping[str, Any]) -> None:
    """Print what a removal over Flower reports."""
    say(f"Removed {results['removed']}; {listed(results['survivors']) or 'nobody'} stay.")
    print_effect({"before": results["accuracy_before"], "after": results["accuracy_after"]})
    if results["to_retrain"]:
        say(
            "Composition-exact, not influence-exact: trained with something of "
            f"{results['removed']} were {listed(results['to_retrain'])}."
        )
    for note in results["notes"]:
        say(f"Note: {note}")
    say(f"Record: {results['record']}")


def print_effect(accuracy: Mapping[str, Any]) -> None:
    """Print what a removal does to accuracy, client by client, or why nobody knows."""
    if "reason" in accuracy:
        say(f"Its effect on accuracy was not measured: {accuracy['reason']}")
        return
    title = "Accuracy, %, before the removal → after it"
    caption = f"The model may know fewer classes afterwards.\n{EXPLAINED}"
    table = _accuracies(title, caption, ALL_CLASSES, "→", OWN_CLASSES, "→")
    for client, before in accuracy["before"].items():
        both = before, accuracy["after"].get(client, {})
        keys = "class_il_accuracy", "task_il_accuracy"
        figures = (percent(own.get(key)) for key in keys for own in both)
        table.add_row(client, str(before["num_examples"]), *figures)
    table_console().print(table)


def _accuracies(title: str, caption: str, *columns: str) -> Table:
    counted = numbers("images", *columns)
    return Table("client", *counted, title=title, caption=caption, caption_justify="left")
