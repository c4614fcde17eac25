"""Replays the journal to learn what a registry held at an earlier moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedcompo.registry.journal import Entry
from fedcompo.registry.state import State, member_from


def members_after(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """Replay the journal: the members after these lines, by client."""
    members: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry.event == "added":
            members |= {member["client"]: member for member in entry.details["clients"]}
        elif entry.event == "removed":
            members.pop(entry.details["client"], None)
        for client, sha256 in entry.details.get("rounded", {}).items():
            members[client] = {**members[client], "rounded_sha256": sha256}
    return members


def root_of(
    state: State, members: Mapping[str, Mapping[str, Any]], files: Mapping[str, str]
) -> str:
    """Compute the root of the registry with these members.

    Args:
        state: Says backbone and settings, which never change.
        members: By client, each as its line of the journal describes it.
        files: SHA-256 of the composition's files, by name.
    """
    known = {
        client: member_from({**values, "folder": ""}) for client, values in sorted(members.items())
    }
    return replace(state, members=known, files=dict(files)).root


def line_of(folder: str) -> int:
    """Number of the journal's line that wrote a composition, by its folder; 0: not known."""
    number = folder.rpartition("/")[2]
    return int(number) if number.isdecimal() else 0


def end_of_change(entries: Sequence[Entry], line: int) -> Entry | None:
    """Find the last line of the change that begins with a line, counted from 1."""
    after = entries[line - 1 :] if line > 0 else ()
    return next((entry for entry in after if "root_after" in entry.details), None)
