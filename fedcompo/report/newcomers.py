"""Clients that claim classes which others had before them: mostly welcome, sometimes a lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedcompo.report.twins import few, visible


def newcomers(arrivals: Iterable[tuple[int, str, Iterable[str]]]) -> dict[str, list[str]]:
    """Find who came to a class that another had.

    Args:
        arrivals: Time of arrival, in any unit, name, and classes of each client.

    Returns:
        Those of its classes that came before it, by client.
    """
    first: dict[str, int] = {}
    came = sorted((when, client, sorted(classes)) for when, client, classes in arrivals)
    for when, _, classes in came:
        for name in classes:
            first.setdefault(name, when)
    shared = {client: [n for n in classes if first[n] < when] for when, client, classes in came}
    return {client: classes for client, classes in shared.items() if classes}


def note_on_newcomers(found: Mapping[str, list[str]]) -> str:
    """Write a note on newcomers; empty if there are none."""
    if not found:
        return ""
    listed = few([f"{c} ({few([visible(n) for n in names])})" for c, names in found.items()])
    return (
        f"Came to classes that others had before: {listed}. They shape these classes as much as "
        "the others do; if they should not, remove them, and name a class's clients in owners.toml."
    )
