"""Limits of the service, for one caller and for all together."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from fedcompo.errors import ConfigError
from fedcompo.service.refusals import Code, Refused
from fedcompo.service.transfer import LARGEST_PIECE

CALLERS_KNOWN = 4096
"""Buckets kept; beyond, those that are full again are forgotten."""


@dataclass(frozen=True)
class Limits:
    """The limits; sizes in bytes, times in seconds."""

    message: int = LARGEST_PIECE + (1 << 16)
    """A single message: one chunk and its wrapping."""
    contribution: int = 4 << 30
    """All files of a contribution, and so of a client's upload."""
    description: int = 4 << 20
    """The parts of a contribution that are read as a whole: its card, the header of tensors."""
    tensor: int = 256 << 20
    """A single tensor; each is in memory as a whole while it is checked."""
    spare: int = 256 << 20
    """Space on the disk that no upload may take."""
    stale: float = 86_400.0
    """Abandoned uploads are deleted after so long."""
    rate: float = 20.0
    """Calls a second and caller, in the long run."""
    burst: int = 60
    """Calls at once, after a pause."""
    calls_each: int = 8
    """Calls of one caller under way."""
    calls: int = 128
    """Calls under way, of all callers."""
    heavy: int = 2
    """Compositions and verifications under way; the others wait."""
    models: int = 16
    """Composed models on disk, most of them being sent; the others wait."""
    seconds: float = 3600.0
    """The longest a call may take, waiting included."""
    grace: float = 30.0
    """How long calls under way may take to end when the service ends."""

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` unless all are positive; only ``spare`` may be zero."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value > 0 or (value == 0 and field.name == "spare")):
                raise ConfigError(f"The limit `{field.name}` must be positive, got {value}.")
        # gRPC counts bytes of a message, and milliseconds, in 32 bits.
        largest = {"message": 2**31 - 1, "seconds": 2_000_000.0, "grace": 2_000_000.0}
        for name, most in largest.items():
            if getattr(self, name) > most:
                raise ConfigError(f"The limit `{name}` may be {most:.0f} at most.")


def limits_of(texts: Sequence[str]) -> Limits:
    """The limits with some of them changed.

    Args:
        texts: ``name=value``; sizes in bytes, times in seconds.

    Raises:
        ConfigError: If a name is no limit, or its value is not valid.
    """
    kinds: dict[str, type[int] | type[float]] = {
        field.name: float if isinstance(field.default, float) else int for field in fields(Limits)
    }
    changed: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in kinds:
            raise ConfigError(
                f"`{text}` sets no limit; expected one of {', '.join(kinds)}, as name=value."
            )
        try:
            changed[name] = kinds[name](value)
        except ValueError as error:
            what = "a whole number" if kinds[name] is int else "a number"
            raise ConfigError(f"`{text}`: the limit `{name}` is {what}, got {value!r}.") from error
    return Limits(**changed)


class Turns:
    """Limits each caller to so many calls a second (a token bucket), and so many at a time."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with full buckets."""
        self._limits, self._clock = limits, clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}  # tokens, and when they were counted
        self._under_way: Counter[str] = Counter()

    @contextmanager
    def taken(self, caller: str) -> Iterator[None]:
        """Count a call as under way.

        Raises:
            Refused: If the caller calls too often, or has too many calls under way.
        """
        with self._lock:
            self._take_token(caller)
            if self._under_way[caller] >= self._limits.calls_each:
                raise Refused(
                    Code.RESOURCE_EXHAUSTED,
                    f"{caller} has {self._under_way[caller]} calls under way, and may have "
                    f"{self._limits.calls_each}. Wait for one to end.",
                )
            self._under_way[caller] += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way[caller] -= 1
                self._under_way += Counter()  # forget who has none

    def _take_token(self, caller: str) -> None:
        now, limits = self._clock(), self._limits
        tokens, counted = self._buckets.get(caller, (float(limits.burst), now))
        tokens = min(float(limits.burst), tokens + (now - counted) * limits.rate)
        if tokens < 1:
            raise Refused(
                Code.RESOURCE_EXHAUSTED,
                f"{caller} calls more than {limits.rate:g} times a second. Wait, then try again.",
            )
        self._buckets[caller] = (tokens - 1, now)
        if len(self._buckets) > CALLERS_KNOWN:
            whole = limits.burst / limits.rate
            self._buckets = {c: b for c, b in self._buckets.items() if now - b[1] < whole}


class Places:
    """A number of places; a call without one waits for as long as it may take."""

    def __init__(self, count: int) -> None:
        """Set how many there are."""
        self._free = threading.Semaphore(count)

    @contextmanager
    def taken(self, seconds: float) -> Iterator[None]:
        """Wait for a place, and hold it.

        Raises:
            Refused: If none was free in time.
        """
        if not self._free.acquire(timeout=max(0.0, seconds)):
            raise Refused(
                Code.RESOURCE_EXHAUSTED,
                f"The service had others to serve for {seconds:.0f} s. Try again later.",
            )
        try:
            yield
        finally:
            self._free.release()
