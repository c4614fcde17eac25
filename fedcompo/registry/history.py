"""Replays the journal to learn what a registry held at an earlier moment."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedcompo.registry.journal import Entry
from fedcompo.registry.state import State, member_from


@dataclass(frozen=True)
class Stay:
    """A contribution's time in the registry."""

    client: str
    """Or the folder of a contribution that lies about."""
    since: float
    """Number of the journal's line that added it; infinite: the journal does not know it."""
    until: float = math.inf
    """Line that removed it; infinite: it is there."""
    values: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What the journal says of it."""
    rounded: tuple[str, ...] = field(default=(), compare=False)
    """Digests of its task vector; several, if machines that rounded differently composed it."""

    def __str__(self) -> str:
        """Who it is, and when."""
        if self.since == math.inf:
            return self.client
        end = "" if self.until == math.inf else f" to {self.until}"
        return f"{self.client} (line {self.since}{end})"


def stays_in(entries: Sequence[Entry]) -> list[Stay]:
    """Replay the journal: who has been there, and when; those of one client in their order."""
    past: list[Stay] = []
    present: dict[str, Stay] = {}

    def leaves(client: str, entry: Entry, details: Mapping[str, Any]) -> None:
        if stay := present.pop(client, None):
            values = {**details, **stay.values}
            past.append(replace(stay, until=entry.sequence, values=values))

    for entry in entries:
        if entry.event == "removed":
            leaves(entry.details["client"], entry, entry.details)
        for own in entry.details["clients"] if entry.event == "added" else ():
            leaves(own["client"], entry, {})  # a journal that was forged may not say that it left
            stay = Stay(own["client"], entry.sequence, math.inf, own, (own["rounded_sha256"],))
            present[stay.client] = stay
        for client, sha256 in entry.details.get("rounded", {}).items():
            if there := present.get(client):
                values = {**there.values, "rounded_sha256": sha256}
                present[client] = replace(there, values=values, rounded=(*there.rounded, sha256))
    return [*past, *present.values()]


def members_after(entries: Sequence[Entry]) -> dict[str, Mapping[str, Any]]:
    """Replay the journal: the members after these lines, by client."""
    return {stay.client: stay.values for stay in stays_in(entries) if stay.until == math.inf}


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


def outcome_of(entries: Sequence[Entry]) -> Mapping[str, Any]:
    """Find what the last change of the composition says of its outcome; empty: there is none."""
    return next((e.details for e in reversed(entries) if "root_after" in e.details), {})
