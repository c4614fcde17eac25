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

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, Self, TypeVar

from fedcompo.report.units import duration

T = TypeVar("T")
QUIET = 2.0
"""Seconds of work that nobody is told of."""
PAUSE = 1.0
"""Seconds between two reports, at least."""
RECENT = 15.0
"""Seconds over which the rate is measured."""
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

    def event(self) -> dict[str, Any]:
        """The entries of an event; see :mod:`fedcompo.engine.log`."""
        return asdict(self)

    @classmethod
    def of(cls, event: Any) -> Self:
        """Read the entries of an event."""
        return cls(**{name: event[name] for name in cls.__dataclass_fields__ if name in event})

    def __str__(self) -> str:
        if not self.total:
            return self.what
        counted = f"{self.what}: {self.done:,} of {self.total:,} {self.unit}"
        if self.ended:
            return f"{counted} in {duration(self.seconds)}"
        if not self.rate:
            return counted
        rate = f"{self.rate:,.0f}/s" if self.rate >= 10 else f"{self.rate:.2g}/s"
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


def each(items: Iterable[T], unit: str, what: str, *, total: int) -> Iterator[T]:
    """Pass items on, and count each as done when the next one is asked for; see :func:`track`."""
    with track(total, unit, what) as count:
        for item in items:
            yield item
            count(1)


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


def every(seconds: float, write: Callable[[str], None]) -> Listener:
    """Make a listener that writes a line at most so often; and one when counted work ends."""
    last = time.monotonic()

    def listener(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if progress.ended or now - last >= seconds:
            last = now
            write(str(progress))

    return listener
