"""Clients that come to classes which others had before them: mostly welcome, sometimes a lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedcompo.report.twins import few, visible

Arrival = tuple[int, str, Iterable[str]]
"""When a client came, in any unit; its name; its classes."""


def newcomers(arrivals: Iterable[Arrival]) -> dict[str, list[str]]:
    """Find the classes that each client shares with one that came before it, by client."""
    first: dict[str, int] = {}
    found: dict[str, list[str]] = {}
    for when, client, classes in sorted(arrivals, key=lambda arrival: arrival[:2]):
        if shared := [n for n in sorted(classes) if first.setdefault(n, when) < when]:
            found[client] = shared
    return found


def note_on_newcomers(found: Mapping[str, Iterable[str]]) -> str:
    """Write a note on newcomers; empty if there are none."""
    if not found:
        return ""
    listed = few([f"{c} ({few([visible(n) for n in names])})" for c, names in found.items()])
    return (
        f"Came to classes that others had before: {listed}. If they should not have these, remove "
        "them, and name the clients of each class in owners.toml."
    )
