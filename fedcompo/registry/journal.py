"""An append-only journal whose lines are chained: each carries the SHA-256 of the one before.

A line is canonical JSON. One that is changed, dropped, added or moved breaks the chain from there
on; the last link is held by the registry's state, and by every signed removal record.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from fedcompo.errors import RegistryDamaged
from fedcompo.storage.files import canonical

START = "0" * 64
"""Stands in the first line in place of a predecessor's SHA-256."""


@dataclass(frozen=True)
class Entry:
    """One line."""

    sequence: int
    """Its number, from 1."""
    time: str
    """UTC, ISO 8601."""
    event: str
    """``created``, ``added``, ``removed``, ``realigned`` or ``rotated`` (the key)."""
    details: Mapping[str, Any]
    """The facts of the event; JSON values."""
    previous: str
    """SHA-256 of the line before."""

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the line, which the next one carries; hexadecimal."""
        return hashlib.sha256(canonical(self._content()).encode()).hexdigest()

    @cached_property
    def line(self) -> str:
        """The entry as it stands in the file, without the line's end."""
        return canonical({**self._content(), "sha256": self.sha256})

    @property
    def clients(self) -> list[str]:
        """Clients that it is about."""
        named = [m["client"] if isinstance(m, dict) else m for m in self.details.get("clients", ())]
        return [*named, *([self.details["client"]] if "client" in self.details else [])]

    def _content(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def follow(last: Entry | None, events: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Entry]:
    """Make the entries that come after ``last``, all of the same second."""
    now, entries = utc_now(), []
    for event, details in events:
        sequence, previous = (last.sequence + 1, last.sha256) if last else (1, START)
        last = Entry(sequence, now, event, details, previous)
        entries.append(last)
    return entries


def read(path: Path, *, upto: int | None = None) -> list[Entry]:
    """Read and check a journal.

    Args:
        path: The file.
        upto: Number of the last line to read; what comes after belongs to a change under way.

    Raises:
        RegistryDamaged: If a line is altered, missing, or not in its place; names it.
    """
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise RegistryDamaged(f"The journal {path} cannot be read: {error}.") from error
    lines = text.split("\n")
    ended, lines = lines[-1] == "", lines[:-1]
    entries: list[Entry] = []
    for number, line in enumerate(lines if upto is None else lines[:upto], start=1):
        entries.append(_parsed(path, line, number, entries[-1].sha256 if entries else START))
    if upto is not None and len(entries) < upto:
        raise RegistryDamaged(f"The journal {path} has {len(entries)} lines, expected {upto}.")
    if upto is None and not ended:
        raise RegistryDamaged(f"The journal {path} ends within a line, after line {len(entries)}.")
    return entries


def _parsed(path: Path, line: str, number: int, previous: str) -> Entry:
    try:
        values = json.loads(line)
        del values["sha256"]
        entry = Entry(**values)
        intact = entry.line == line and entry.sequence == number and entry.previous == previous
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise RegistryDamaged(
            f"Line {number} of the journal {path} was altered, or the line before it was: the "
            "chain is broken there. Restore the journal from a copy."
        )
    return entry


def utc_now() -> str:
    """The time, UTC, ISO 8601 to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
