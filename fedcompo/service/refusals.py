"""What the service says when it does not do what it is asked: a status, and a whole sentence.

Of the machine it runs on it tells nothing: paths are cut to the last name, and what nobody foresaw
is logged here and not told there.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import grpc

from fedcompo.errors import (
    BackboneMismatch,
    ConfigError,
    ContributionError,
    FedcompoError,
    FileFormatError,
    RegistryDamaged,
    RegistryError,
    RegistryLocked,
    ServiceError,
)

LOGGER = logging.getLogger(__name__)

Code = grpc.StatusCode

CODES: tuple[tuple[type[FedcompoError], grpc.StatusCode], ...] = (
    (ConfigError, Code.INVALID_ARGUMENT),
    (FileFormatError, Code.INVALID_ARGUMENT),
    (BackboneMismatch, Code.FAILED_PRECONDITION),
    (ContributionError, Code.FAILED_PRECONDITION),
    (RegistryLocked, Code.UNAVAILABLE),
    (RegistryDamaged, Code.DATA_LOSS),
    (RegistryError, Code.ABORTED),
)
"""The first that fits counts. ABORTED and UNAVAILABLE say: the same call may succeed later."""
PASSING = frozenset({Code.ABORTED, Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED})
"""What may be otherwise when the call is made again; all else is final."""
FULL = (errno.ENOSPC, errno.EDQUOT)
LONGEST = 2000
"""Characters of a sentence; it travels in a header."""
UNFORESEEN = "The service failed, and has logged why. Nothing half done stays; tell its operator."


class Refused(ServiceError):
    """A call that is refused, with the status to refuse it with."""

    def __init__(self, code: grpc.StatusCode, sentence: str) -> None:
        """Say how, and why."""
        super().__init__(sentence)
        self.code = code


def answer_to(error: Exception, hidden: Mapping[Path, str]) -> tuple[grpc.StatusCode, str]:
    """Status and sentence for an error.

    Args:
        error: What was raised.
        hidden: Folders that nobody outside needs to know, and what to call them instead.
    """
    if isinstance(error, Refused):
        return error.code, outward(str(error), hidden)
    if isinstance(error, FedcompoError):
        code = next((code for kind, code in CODES if isinstance(error, kind)), Code.INTERNAL)
        return code, outward(str(error), hidden)
    if isinstance(error, OSError) and error.errno in FULL:
        return Code.RESOURCE_EXHAUSTED, "The server's disk is full; try again later."
    return Code.INTERNAL, UNFORESEEN


def outward(text: str, hidden: Mapping[Path, str]) -> str:
    """A text as it may leave the machine."""
    for path, name in sorted(hidden.items(), key=lambda item: -len(str(item[0]))):
        text = text.replace(str(path), name)
    return text[:LONGEST]


def log_call(event: str, **values: object) -> None:
    """Write one line for programs: what happened to a call, and whose it was."""
    level = logging.WARNING if event == "refused" else logging.INFO
    LOGGER.log(level, "%s %s", event, json.dumps(values, sort_keys=True, default=str))
