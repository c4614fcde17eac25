"""What is known of a run before it starts, in a few lines or in full."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.table import Table

from fedcompo.report.console import numbers, say, table_console
from fedcompo.report.units import duration, shortened, size

SHOWN = 40
"""Clients, or classes of the only one, that are listed; of more, the first so many."""

Values = Mapping[str, Any]


def lines_on(values: Values, *, at_once: int = 1) -> Iterator[str]:
    """A few lines: counts, what a run takes, notes."""
    counts = [own["classes"] for own in values["clients"].values()]
    names = {name for own in counts for name in own}
    train, test = (sum(part[at] for own in counts for part in own.values()) for at in (0, 1))
    all_seen = len(counts) == values["total"]
    who = "" if all_seen else f" of {values['total']} were looked at"
    if counts:
        yield (
            f"{len(counts)} client(s){who}: {len(names)} classes, {train:,} images to train on and "
            f"{test:,} to test on"
        )
    if about := values["estimate"]:
        yield (
            f"About {duration(about['seconds'])}; memory {size(about['memory'])} for each of "
            f"{at_once} at a time; a client sends {size(about['sent'])} and receives "
            f"{size(about['received'])}; on disk {size(about['disk'])} (estimates)"
        )
    yield from (f"Note: {note}" for note in values["notes"])


def print_preflight(values: Values, *, at_once: int) -> None:
    """Print everything, and whether it can be used."""
    clients = values["clients"]
    if len(clients) == 1:
        ((name, own),) = clients.items()
        table = Table("class", *numbers("train", "test"), title=f"Client {name}")
        rows = [(each, *_counts([counts])) for each, counts in own["classes"].items()]
    else:
        table = Table("client", "classes", *numbers("train", "test"), title="Clients")
        rows = [
            (name, shortened([*own["classes"]]), *_counts(own["classes"].values()))
            for name, own in clients.items()
        ]
    for row in rows[:SHOWN]:
        table.add_row(*row)
    if len(rows) > SHOWN:
        table.add_row(f"... and {len(rows) - SHOWN} more")
    if rows:
        table_console().print(table)
        say(_looked_at(clients.values()))
    if backbone := values["backbone"]:
        shape = " x ".join(map(str, backbone["shape"]))
        say(
            f"Backbone {backbone['name']}: {backbone['parameters']:,} parameters; reads "
            f"{backbone['reads']} of {shape} (channels, height, width)"
        )
    for line in lines_on(values, at_once=at_once):
        say(line)
    for fault in values["faults"]:
        say(f"FAULT: {fault}")
    faults = len(values["faults"])
    say(f"Cannot be used: {faults} fault(s)." if faults else "Nothing speaks against a run.")


def _counts(classes: Iterable[list[int]]) -> list[str]:
    """Number of training images, and of test images, of some classes."""
    return [f"{sum(part):,}" for part in zip(*classes, strict=True)]


def _looked_at(clients: Any) -> str:
    """How thorough the checks were, and how fast examples are read."""
    keys = ("headers", "read", "size", "seconds")
    headers, read, weight, spent = (sum(own[key] for own in clients) for key in keys)
    count = sum(sum(map(sum, own["classes"].values())) for own in clients)
    rate = f", {read / spent:,.0f} a second" if spent else ""
    more = "" if read == count else " (`--full` reads all)"
    files = f" of {size(weight)}" if weight else ""
    return f"Headers of {headers:,} of {count:,} examples{files}, whole {read:,}{rate}{more}"
