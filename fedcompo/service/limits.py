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

from fedcompo.config.scenario import parse_assignment
from fedcompo.config.setting import NOT_NEGATIVE, POSITIVE, Check, check_one, setting
from fedcompo.errors import ConfigError
from fedcompo.service.access import Peer
from fedcompo.service.refusals import Code, Refused
from fedcompo.service.transfer import LARGEST_PIECE

EACH = 2
"""Places of a kind that one caller may hold or wait for: compositions, verifications, changes."""
CALLERS_KNOWN = 4096
"""Buckets kept; beyond, those that are full again are forgotten."""


SHORT: Check = (lambda value: value <= 2_000_000, "must be at most 2000000")
FEW: Check = (lambda value: value < 2**31, "must be at most 2147483647")
"""gRPC counts bytes of a message, and milliseconds, in 32 bits."""


@dataclass(frozen=True)
class Limits:
    """The limits; sizes in bytes, times in seconds."""

    message: int = setting(
        LARGEST_PIECE + (1 << 16), "A single message: one chunk and its wrapping.", POSITIVE, FEW
    )
    contribution: int = setting(4 << 30, "All files of one, and so of a client's upload.", POSITIVE)
    description: int = setting(4 << 20, "What is read whole: card, header of tensors.", POSITIVE)
    tensor: int = setting(256 << 20, "A single one; each is whole in memory for a check.", POSITIVE)
    spare: int = setting(256 << 20, "Space on the disk that no upload may take.", NOT_NEGATIVE)
    stale: float = setting(86_400.0, "Abandoned uploads are deleted after so long.", POSITIVE)
    rate: float = setting(20.0, "Calls a second and caller, in the long run.", POSITIVE)
    burst: int = setting(60, "Calls at once, after a pause.", POSITIVE)
    calls_each: int = setting(8, "Calls of one caller under way; one in a crowd.", POSITIVE)
    calls: int = setting(128, "Calls of members under way.", POSITIVE)
    kept: int = setting(8, "More of them, for operators alone.", POSITIVE)
    heavy: int = setting(2, "Members' compositions and verifications under way.", POSITIVE)
    models: int = setting(16, "Composed models of members on disk, most being sent.", POSITIVE)
    connections: int = setting(4096, "But at most half of the files it may open.", POSITIVE, FEW)
    handshake: float = setting(10.0, "Time to show a certificate.", POSITIVE, SHORT)
    idle: float = setting(
        60.0, "How long a call waits for its caller, and a connection for a call.", POSITIVE, SHORT
    )
    seconds: float = setting(3600.0, "The longest call, waiting included.", POSITIVE, SHORT)
    grace: float = setting(30.0, "Time to end calls when the service ends.", POSITIVE, SHORT)


def limits_of(texts: Sequence[str]) -> Limits:
    """The limits with some of them changed, by ``name=value``; in bytes and seconds.

    Raises:
        ConfigError: If a name is no limit, or its value is not valid.
    """
    known = {field.name: field for field in fields(Limits)}
    changed: dict[str, Any] = {}
    for text in texts:
        name, value = parse_assignment(text)
        if name not in known:
            raise ConfigError(f"`{text}` sets no limit; expected one of {', '.join(known)}.")
        try:
            changed[name] = check_one(name, known, value)
        except ValueError as error:
            raise ConfigError(f"The limit {error}") from error
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
