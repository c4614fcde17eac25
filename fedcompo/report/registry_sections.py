"""Sections of a report on a registry: who is in it, who left, and the receipts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedcompo.report.page import Alert, Column, Section, Table, numbers
from fedcompo.report.units import listed

Values = Mapping[str, Any]


def registry_alerts(registry: Values) -> list[Alert]:
    """Say which receipts do not hold."""
    return [
        Alert(f"The receipt {one['record']} of {one['client']}: {one['fault']}", grave=True)
        for one in registry["removed"]
        if one["fault"]
    ]


def registry_sections(registry: Values) -> list[Section]:
    """Sections on members, removals, journal and identity."""
    return [_members(registry), _removed(registry), _identity(registry)]


def _members(registry: Values) -> Section:
    columns = [Column("client"), Column("classes"), Column("kind"), *numbers("images")]
    columns += [*numbers("length ‖τ‖"), Column("joined"), *numbers("line", "shaped by")]
    rows = [
        [
            one["client"],
            listed(one["classes"]),
            one["kind"],
            one["num_examples"],
            "–" if one["norm"] is None else f"{one['norm']:.4g}",
            one["added"],
            one["line"],
            len(one["shaped_by"]),
        ]
        for one in registry["clients"]
    ]
    sentences = [
        "line: of the journal. shaped by: number of clients whose data shaped its training; "
        "`fedcompo show CLIENT` names them."
    ]
    if not rows:
        return Section("Who is in", [], ["Nobody is in the registry."])
    return Section("Who is in", [Table("Members", columns, rows)], sentences)


def _removed(registry: Values) -> Section:
    removed = registry["removed"]
    if not removed:
        return Section("Who is out", [], ["Nobody was removed."])
    columns = [Column("client"), Column("removed"), Column("asked by"), Column("reason")]
    columns += [Column("classes"), *numbers("images"), Column("to train again")]
    rows = [
        [
            one["client"],
            one["time"],
            one["requested_by"] or "–",
            one["reason"] or "–",
            listed(one["classes"]),
            one["num_examples"],
            listed(one["to_retrain"]) or "nobody",
        ]
        for one in removed
    ]
    titles = ("client", "record", "line", "signature", "SHA-256 of the record")
    receipts = [
        [
            one["client"],
            one["record"],
            one["line"],
            one["fault"] or "holds",
            one["record_sha256"],
            one["root_before"],
            one["root_after"],
        ]
        for one in removed
    ]
    return Section(
        "Who is out",
        [
            Table("Removed", columns, rows),
            Table("Receipts", [*map(Column, (*titles, "root before", "root after"))], receipts),
        ],
        [
            "Each removal left a signed record. The model holds nothing of these clients, bit for "
            "bit; members to train again were trained with something of them.",
            f"`fedcompo verify {registry['registry']}/RECORD` checks all that a record claims.",
        ],
    )


def _identity(registry: Values) -> Section:
    pair = [Column("what"), Column("value")]
    facts = [[key, registry[key]] for key in ("registry", "identity", "backbone", "root")]
    facts += [["journal's last SHA-256", registry["journal"][-1]["sha256"]]]
    settings = [
        [key, "–" if value is None else str(value)] for key, value in registry["settings"].items()
    ]
    lines = [
        [str(one["line"]), one["time"], one["event"], listed(one["clients"]), one["sha256"]]
        for one in registry["journal"]
    ]
    columns = [*map(Column, ("line", "time", "event", "clients", "SHA-256"))]
    journal = Table("Journal", columns, lines, folded=True)
    return Section(
        "Registry",
        [
            Table("Identity", pair, facts),
            Table("How it composes", pair, settings, folded=True),
            journal,
        ],
    )
