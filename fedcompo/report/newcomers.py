"""Clients that come to classes which others had before them: mostly welcome, sometimes a lie."""

from __future__ import annotations

from collections.abc import Container, Iterable

from fedcompo.report.twins import few, visible


def note_on_newcomers(
    arrivals: Iterable[tuple[int, str, Iterable[str]]], among: Container[str] | None = None
) -> str:
    """Write a note on them; empty if there are none.

    Args:
        arrivals: When each client came, in any unit; its name; its classes.
        among: Clients to look at; None: all.
    """
    first: dict[str, int] = {}
    found = []
    for when, client, classes in sorted(arrivals, key=lambda arrival: arrival[:2]):
        shared = [name for name in sorted(classes) if first.setdefault(name, when) < when]
        if shared and (among is None or client in among):
            found.append(f"{client} ({few([visible(name) for name in shared])})")
    if not found:
        return ""
    return (
        f"Came to classes that others had before: {few(found)}. If they should not have these, "
        "remove them, and name the clients of each class in owners.toml."
    )
