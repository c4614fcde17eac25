"""Turns an error into the answer to a call: a status, and a whole sentence.

The answer reveals nothing about the server's machine: hidden folders are renamed, and an unforeseen
error is logged here and not sent.
"""

from __future__ import annotations

import errno
import json
import logging
import os
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
"""The first that fits counts. After ABORTED and UNAVAILABLE, the same call may succeed later."""
RETRYABLE = frozenset({Code.ABORTED, Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED})
"""Statuses after which a call may be made again; all others are final."""
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""Errors of the system that pass when others have gone."""
BROKEN = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
"""Errors of the system that pass when its operator has done something."""
LONGEST = 2000
"""Characters of a sentence; it travels in a header."""
UNFORESEEN = "The service failed, and has logged why. Nothing half done stays; tell its operator."


class Refused(ServiceError):
    """A call that is refused, with the status to refuse it with."""

    def __init__(self, code: grpc.StatusCode, sentence: str, *, quiet: bool = False) -> None:
        """Keep the status, the reason as a sentence, and whether it stays out of the log."""
        super().__init__(sentence)
        self.code, self.quiet = code, quiet


def answer_to(error: Exception, hidden: Mapping[Path, str]) -> tuple[grpc.StatusCode, str]:
    """Status and sentence for an error; hidden folders are called by the names given."""
    if isinstance(error, Refused):
        return error.code, redacted(str(error), hidden)
    system: BaseException | None = error  # or its cause: what cannot be read is not yet damaged
    while system is not None and not isinstance(system, OSError):
        system = system.__cause__
    if system is not None and system.errno in FULL | BROKEN:
        code, advice = Code.RESOURCE_EXHAUSTED, "Try again later"
        if system.errno in BROKEN:
            code, advice = Code.FAILED_PRECONDITION, "Tell its operator"
        return code, f"The server's system refuses: {os.strerror(system.errno)}. {advice}."
    if isinstance(error, FedcompoError):
        code = next((code for kind, code in CODES if isinstance(error, kind)), Code.INTERNAL)
        return code, redacted(str(error), hidden)
    return Code.INTERNAL, UNFORESEEN


def redacted(text: str, hidden: Mapping[Path, str]) -> str:
    """Shorten a text and rename hidden folders, so that it may leave the machine."""
    for path, name in sorted(hidden.items(), key=lambda item: -len(str(item[0]))):
        text = text.replace(str(path), name)
    return text[:LONGEST]


def log_call(event: str, **values: object) -> None:
    """Log one line for programs: what happened to a call, and who made it."""
    level = logging.WARNING if event == "refused" else logging.INFO
    LOGGER.log(level, "%s %s", event, json.dumps(values, sort_keys=True, default=str))
