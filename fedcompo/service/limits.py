"""Limits of the service, for one caller and for all together."""

from __future__ import annotations

import bisect
import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from fedcompo.errors import ConfigError
from fedcompo.service.access import Peer
from fedcompo.service.refusals import Code, Refused
from fedcompo.service.transfer import LARGEST_PIECE

EACH = 2
"""Places of a kind that one caller may hold or wait for: compositions, verifications, changes."""
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
    """Calls of one caller under way; one, while half of all places are taken."""
    calls: int = 128
    """Calls of members under way."""
    kept: int = 8
    """More of them, for operators alone."""
    heavy: int = 2
    """Compositions and verifications of members under way; the others wait."""
    models: int = 16
    """Composed models of members on disk, most of them being sent; the others wait."""
    connections: int = 4096
    """Connections; half of the files that the process may open, if that is less."""
    handshake: float = 10.0
    """How long a connection may take to show its certificate."""
    idle: float = 60.0
    """How long a call waits for its caller, and a connection for a call."""
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
        largest = dict.fromkeys(("handshake", "idle", "seconds", "grace"), 2_000_000.0)
        for name, most in {**largest, "message": 2**31 - 1, "connections": 2**31 - 1}.items():
            if getattr(self, name) > most:
                raise ConfigError(f"The limit `{name}` may be {most:.0f} at most.")


def limits_of(texts: Sequence[str]) -> Limits:
    """The limits with some of them changed, by ``name=value``; in bytes and seconds.

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
    """Limits each caller to so many calls a second (a token bucket), and so many at a time.

    While half of the members' places are taken, a caller has one: few callers cannot take them all.
    Operators' calls do not count against the places of members, nor members' against theirs.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with full buckets."""
        self._limits, self._clock = limits, clock
        self._lock = threading.Lock()
        # By caller: its tokens, when they were counted, and when a refusal was last logged.
        self._buckets: dict[tuple[str, bool], tuple[float, float, float]] = {}
        self._under_way: Counter[tuple[str, bool]] = Counter()
        self._members = 0  # calls of theirs that are under way

    @contextmanager
    def taken(self, caller: Peer) -> Iterator[None]:
        """Count a call as under way.

        Raises:
            Refused: If the caller calls too often, or has too many calls under way.
        """
        account, member = caller.account, not caller.operator
        with self._lock:
            self._take_token(caller)
            self._check_room(self._under_way[account], caller)
            self._under_way[account] += 1
            self._members += member
        try:
            yield
        finally:
            with self._lock:
                self._under_way[account] -= 1
                self._members -= member
                self._under_way += Counter()  # forget who has none

    def _check_room(self, under_way: int, caller: Peer) -> None:
        limits, operator = self._limits, caller.operator
        crowded = not operator and 2 * self._members >= limits.calls
        if under_way >= (most := 1 if crowded else limits.calls_each):
            raise Refused(
                Code.RESOURCE_EXHAUSTED,
                f"{caller.name} has {under_way} calls under way, and may have {most} "
                f"{'while many call' if crowded else 'at a time'}. Wait for one to end.",
            )
        if not operator and self._members >= limits.calls:
            raise Refused(
                Code.RESOURCE_EXHAUSTED,
                f"{self._members} calls are under way, as many as may be. Try again later.",
            )

    def _take_token(self, caller: Peer) -> None:
        now, limits = self._clock(), self._limits
        fresh = (float(limits.burst), now, -math.inf)
        tokens, counted, logged = self._buckets.get(caller.account, fresh)
        tokens = min(float(limits.burst), tokens + (now - counted) * limits.rate)
        if tokens < 1:
            quiet = now - logged < 1  # a flood would fill the log
            self._buckets[caller.account] = (tokens, now, logged if quiet else now)
            raise Refused(
                Code.RESOURCE_EXHAUSTED,
                f"{caller.name} calls more than {limits.rate:g} times a second. Wait a moment.",
                quiet=quiet,
            )
        self._buckets[caller.account] = (tokens - 1, now, logged)
        if len(self._buckets) > CALLERS_KNOWN:
            whole = limits.burst / limits.rate
            self._buckets = {c: b for c, b in self._buckets.items() if now - b[1] < whole}


class Places:
    """A number of places; a call without one waits for as long as it may take.

    Operators come first, then whose last turn is longest ago: who calls all the time keeps nobody
    waiting who calls once.
    """

    def __init__(self, count: int, *, kept: int = 0) -> None:
        """Set how many there are for everybody, and how many more are kept for operators."""
        self._count, self._kept = count, kept
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        # Calls that wait and that have a place: whose, the caller's last turn, and their number.
        self._waiting: list[tuple[bool, float, int, str]] = []
        self._served: list[tuple[bool, float, int, str]] = []
        self._last: dict[str, float] = {}  # when a caller had its last turn

    @contextmanager
    def taken(self, caller: Peer, seconds: float) -> Iterator[None]:
        """Wait for a place, and hold it.

        Raises:
            Refused: If the caller has as many as it may, or none was free in time.
        """
        member, name = not caller.operator, caller.name
        count = self._count + (self._kept if caller.operator else 0)
        with self._changed:
            turn = (member, self._last.get(name, -math.inf), next(self._numbers), name)
            if sum(one[::3] == turn[::3] for one in self._waiting + self._served) >= EACH:
                raise Refused(
                    Code.RESOURCE_EXHAUSTED,
                    f"{caller.name} waits for {EACH} compositions, verifications or changes "
                    "already. Wait for one to end.",
                )
            bisect.insort(self._waiting, turn)
            ready = self._changed.wait_for(
                lambda: self._waiting[0] == turn and len(self._served) < count, max(0.0, seconds)
            )
            self._waiting.remove(turn)
            if ready:
                self._served.append(turn)
                self._last[name] = time.monotonic()
            self._changed.notify_all()
        if not ready:
            raise Refused(
                Code.RESOURCE_EXHAUSTED,
                f"The service had others to serve for {seconds:.0f} s. Try again later.",
            )
        try:
            yield
        finally:
            with self._changed:
                self._served.remove(turn)
                self._changed.notify_all()
