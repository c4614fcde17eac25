"""Clients that come to classes which others had before them: mostly welcome, sometimes a lie."""

from __future__ import annotations

from collections.abc import Container, Iterable
from itertools import islice

from fedcompo.report.twins import few, visible


def note_on_newcomers(
    arrivals: Iterable[tuple[int, str, Iterable[str]]], among: Container[str] | None = None
) -> str:
    """Write a note on them; empty if there are none.

    Args:
        arrivals: When each client came, in any unit; its name; its classes.
        among: Clients to look at; None: all.
    """
    first: dict[str, dict[str, int]] = {}  # by class, then by who has it, the earliest first
    found = []
    for when, client, classes in sorted(arrivals, key=lambda arrival: arrival[:2]):
        whole = client.rpartition(".shard-")[0] or client  # shards of a client share its classes
        shared = []
        for name in sorted(classes):
            before = first.setdefault(name, {})
            if any(then < when for who, then in islice(before.items(), 2) if who != whole):
                shared.append(name)
            before.setdefault(whole, when)
        if shared and (among is None or client in among):
            found.append(f"{client} ({few([visible(name) for name in shared])})")
    if not found:
        return ""
    return (
        f"Came to classes that others had before: {few(found)}. If they should not have these, "
        "remove them, and name the clients of each class in owners.toml."
    )
