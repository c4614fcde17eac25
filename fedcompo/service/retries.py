"""Repeats calls that may succeed later, and explains errors to the caller."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from fedcompo.errors import ServiceError
from fedcompo.service.refusals import RETRYABLE, Code

T = TypeVar("T")

ATTEMPTS = 8
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
"""Seconds between attempts; each pause is twice the one before."""


@dataclass(frozen=True)
class Attempts:
    """How often to call before giving up."""

    count: int
    address: str
    """Of the server, for errors."""

    def make(self, attempt: Callable[[], T]) -> T:
        """Call until there is an answer, or a final refusal.

        Raises:
            ServiceError: If the server refuses, or cannot be reached.
        """
        pause = FIRST_PAUSE
        for left in reversed(range(max(1, self.count))):
            try:
                return attempt()
            except grpc.RpcError as error:
                if not left or error.code() not in RETRYABLE:
                    raise self._described(error) from error
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        raise AssertionError("the last attempt returns or raises")

    def _described(self, error: Any) -> ServiceError:
        code, details = error.code(), error.details()
        if code is Code.UNAVAILABLE and "Connection refused" in str(details):
            return ServiceError(
                f"Nothing listens at {self.address}. Is that the address? If it is, ask its "
                "operator to start the service."
            )
        if code is Code.UNAVAILABLE:
            return ServiceError(
                f"No service answers at {self.address}, it does not accept the certificate, or "
                f"its own is not vouched for: {details}."
            )
        if code is Code.CANCELLED:
            return ServiceError(
                f"{self.address} broke off the call: it lasted too long, or this machine kept it "
                "waiting. Call again: what was transferred is kept."
            )
        return ServiceError(f"{self.address} refuses ({code.name}): {details}")
