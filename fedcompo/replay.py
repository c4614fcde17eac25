"""What a registry held at any moment, as the lines of its journal tell it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedcompo.method.contribution import Lineage
from fedcompo.registry.journal import Entry
from fedcompo.registry.state import Member, State
from fedcompo.storage.files import tuples

Told = Mapping[str, Mapping[str, Any]]
"""Members by client, each as its line of the journal describes it."""


def members_after(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """Members as the journal's lines leave them, by client."""
    members: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry.event == "added":
            members |= {member["client"]: member for member in entry.details["clients"]}
        elif entry.event == "removed":
            members.pop(entry.details["client"], None)
        for client, sha256 in entry.details.get("rounded", {}).items():
            members[client] = {**members[client], "rounded_sha256": sha256}
    return members


def root_of(state: State, members: Told, files: Mapping[str, str]) -> str:
    """Root that the registry has with these members.

    Args:
        state: Says backbone and settings, which never change.
        members: Who is there.
        files: SHA-256 of the composition's files, by name.
    """
    known = {client: _member(values) for client, values in sorted(members.items())}
    return replace(state, members=known, files=dict(files)).root


def line_of(folder: str) -> int:
    """Number of the journal's line that a composition came with, by its folder; 0: not told."""
    number = folder.rpartition("/")[2]
    return int(number) if number.isdecimal() else 0


def end_of_change(entries: Sequence[Entry], line: int) -> Entry | None:
    """Last line of the change whose first is this one, counted from 1; None: there is no such."""
    after = entries[line - 1 :] if line > 0 else ()
    return next((entry for entry in after if "root_after" in entry.details), None)


def as_told(values: object) -> object:
    """Values as they look once they have been JSON: tuples are lists."""
    if isinstance(values, Mapping):
        return {key: as_told(value) for key, value in values.items()}
    return [as_told(value) for value in values] if isinstance(values, list | tuple) else values


def _member(values: Mapping[str, Any]) -> Member:
    lineage = Lineage(**tuples(values["lineage"]))
    return Member(**{**tuples(values), "lineage": lineage, "folder": ""})
