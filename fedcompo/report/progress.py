"""How far long work has come: deep code counts, and whoever listens is told.

Example::

    with track(len(images), "images", "features") as count:
        for batch in batches:
            ...
            count(len(batch))

A process that wants to know listens: a client's, the server's, a command's. Where nobody listens,
counting costs nothing. Work that is over within two seconds is not told of; of other work once a
second, and when it ends.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from fedcompo.report.units import duration, size

T = TypeVar("T")
QUIET = 2.0
"""Seconds of work that nobody is told of."""
PAUSE = 1.0
"""Seconds between two reports, at least."""
RECENT = 15.0
"""Seconds over which the rate is measured."""
BYTES = "bytes"
"""Unit that is written as sizes are."""
LINE = 10.0
"""Seconds between two lines of a log, or in a pipe."""


@dataclass(frozen=True)
class Progress:
    """What is being done, and how much of it."""

    what: str
    done: int = 0
    total: int = 0
    """0: it is not counted."""
    unit: str = ""
    """What is counted, in the plural, such as ``images``."""
    rate: float = 0.0
    """Units a second, lately; 0: not known yet."""
    seconds: float = 0.0
    """Since the work began."""

    @property
    def ended(self) -> bool:
        """Whether all that was counted is done."""
        return 0 < self.total <= self.done

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> Self:
        """Read the entries of an event; see :mod:`fedcompo.engine.log`."""
        return cls(**{name: event[name] for name in cls.__dataclass_fields__ if name in event})

    def __str__(self) -> str:
        if not self.total:
            return self.what
        if self.unit == BYTES:
            counted = f"{self.what}: {size(self.done)} of {size(self.total)}"
            rate = f"{size(round(self.rate))}/s"
        else:
            counted = f"{self.what}: {self.done:,} of {self.total:,} {self.unit}"
            rate = f"{self.rate:,.0f}/s" if self.rate >= 10 else f"{self.rate:.2g}/s"
        if self.ended:
            return f"{counted} in {duration(self.seconds)}"
        if not self.rate:
            return counted
        left = (self.total - self.done) / self.rate
        return f"{counted}, {rate}, {duration(left) if left >= 60 else f'{left:.0f} s'} left"


Listener = Callable[[Progress], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell a listener of all work inside, in place of an outer one; it must not raise."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def step(what: str) -> None:
    """Tell what is done from now on, where there is nothing to count."""
    if listener := _listener.get():
        listener(Progress(what))


@contextmanager
def track(total: int, unit: str, what: str) -> Iterator[Callable[[int], None]]:
    """Count work; yields what is called with the number of units that were done since.

    Args:
        total: Units in all.
        unit: What is counted, in the plural: ``images``, ``files``.
        what: What is being done, in a word or two: ``decoding``.
    """
    listener = _listener.get()
    yield _Count(total, unit, what, listener) if listener else lambda units: None


def each(
    items: Iterable[T], unit: str, what: str, *, total: int, units: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Pass items on, and count each when the next one is asked for; see :func:`track`.

    Args:
        items: Pieces of the work, such as batches.
        unit: What is counted.
        what: What is being done.
        total: Units in all.
        units: How many of them an item is; of batches: ``len``.
    """
    with track(total, unit, what) as count:
        for item in items:
            yield item
            count(units(item))


class _Count:
    """Counts one piece of work, and tells of it from time to time."""

    def __init__(self, total: int, unit: str, what: str, listener: Listener) -> None:
        self._total, self._unit, self._what, self._listener = total, unit, what, listener
        self._done, self._began = 0, time.monotonic()
        self._told = self._began + QUIET - PAUSE
        self._recent = deque([(self._began, 0)])

    def __call__(self, units: int) -> None:
        self._done += units
        now = time.monotonic()
        over = self._done >= self._total and self._recent[-1][1] > 0  # it was told of before
        if not over and now - self._told < PAUSE:
            return
        self._told = now
        while len(self._recent) > 1 and now - self._recent[1][0] > RECENT:
            self._recent.popleft()
        since, before = self._recent[0]
        self._recent.append((now, self._done))
        rate = (self._done - before) / max(now - since, 1e-9)
        figures = (self._what, self._done, self._total, self._unit, rate, now - self._began)
        self._listener(Progress(*figures))


def to_lines(write: Callable[[str], None], *, terse: bool = False) -> Listener:
    """Make a listener that writes a line every ten seconds at most.

    Unless it is terse, it also writes one for each step without a number, and when work ends.
    """
    last = time.monotonic()

    def listener(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        apart = progress.ended or not progress.total
        if now - last >= LINE or (apart and not terse):
            last = now
            write(str(progress))

    return listener


@contextmanager
def telling(write: Callable[[str], None], file: Path | None = None, **about: str) -> Iterator[None]:
    """Write a line of all work inside every ten seconds, and what is new to a file meanwhile.

    Args:
        write: Takes a line.
        file: Place of a file that holds the latest event for another process (:class:`Files`), and
            is gone in the end. None: there is no such process.
        about: What else the event says: ``client``, ``phase``.
    """
    lines = to_lines(write)
    file = file and Path(f"{file}.json")
    aside = file and file.with_name(f".{file.name}")

    def listener(progress: Progress) -> None:
        lines(progress)
        if file and aside:
            entries = {**about, **asdict(progress), "time": time.time()}
            with suppress(OSError):  # a full disk must not end the work
                file.parent.mkdir(parents=True, exist_ok=True)
                aside.write_text(json.dumps(entries), encoding="utf-8")
                aside.replace(file)

    try:
        with listening(listener):
            yield
    finally:
        if file:
            with suppress(OSError):  # others write to the folder
                file.unlink(missing_ok=True)
                file.parent.rmdir()


class Files:
    """Reads what other processes have written by :func:`telling` to the files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, str] = {}

    def read(self) -> list[Mapping[str, Any]]:
        """Read the events since the last call."""
        now, files = {}, list[Path]()
        with suppress(OSError):  # the folder goes with the last of them
            files = sorted(self._folder.glob("[!.]*.json"))
        for file in files:
            with suppress(OSError):  # its work has just ended
                now[file.name] = file.read_text(encoding="utf-8")
        new = [text for name, text in now.items() if text != self._seen.get(name)]
        self._seen = now
        return [{"event": "progress", **json.loads(text)} for text in new]

    def clear(self) -> None:
        """Delete what processes have left that were killed."""
        shutil.rmtree(self._folder, ignore_errors=True)
