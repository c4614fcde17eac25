"""Cuts off calls that take too long, or whose caller keeps them waiting.

A call waits for its caller when it reads a message that does not come, or writes one that nobody
takes. gRPC itself would wait as long as the connection lasts.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import grpc

T = TypeVar("T")


class Call:
    """A call under way."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        """Begin now."""
        self.context, self.began = context, time.monotonic()
        self.waits_since = math.inf
        """Since when it has waited for its caller; infinite: it does not."""

    def received(self, messages: Iterable[T]) -> Iterator[T]:
        """Yield messages of the caller; reading one is waiting for it."""
        self.waits_since = time.monotonic()
        for message in messages:
            self.waits_since = math.inf
            yield message
            self.waits_since = time.monotonic()
        self.waits_since = math.inf

    def sent(self, messages: Iterable[T]) -> Iterator[T]:
        """Yield messages to the caller; the next one is asked for when it has taken the last."""
        for message in messages:
            self.waits_since = time.monotonic()
            yield message
            self.waits_since = math.inf


class Watch:
    """Looks after all calls of a service, in one thread that lives while there are any."""

    def __init__(self, *, idle: float, seconds: float) -> None:
        """Set how long a call waits for its caller, and how long it may take in all."""
        self._idle, self._seconds = idle, seconds
        self._calls: set[Call] = set()
        self._lock = threading.Lock()
        self._watching = False

    @contextmanager
    def over(self, context: grpc.ServicerContext) -> Iterator[Call]:
        """Look after a call."""
        call = Call(context)
        with self._lock:
            self._calls.add(call)
            if not self._watching:
                threading.Thread(target=self._watch, name="watch", daemon=True).start()
                self._watching = True
        try:
            yield call
        finally:
            with self._lock:
                self._calls.remove(call)

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self._idle / 4, self._seconds / 4))
            with self._lock:
                self._watching = bool(self._calls)
                calls = tuple(self._calls)
            if not calls:
                return
            now = time.monotonic()
            for call in calls:
                if now - call.waits_since > self._idle or now - call.began > self._seconds:
                    call.context.cancel()
