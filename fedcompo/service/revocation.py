"""Certificates that count no more before they expire: a key was lost, or its holder shall go.

They stand in a file of the operator's, which is read again whenever it has changed, so that nobody
need restart the service to lock a thief out.
"""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

from fedcompo.errors import ConfigError
from fedcompo.service.access import Peer
from fedcompo.service.refusals import LOGGER, Code, Refused

FINGERPRINT = re.compile(r"[0-9a-f]{64}", re.ASCII)
"""SHA-256 of a certificate, as it stands in the journal; colons are left out before."""
SETTLED = 1.0
"""Seconds without a change after which a list counts as complete: writing it takes a moment."""


class Revoked:
    """The SHA-256 of certificates that are refused; one a line, and ``#`` begins a comment.

    What ``openssl x509 -noout -fingerprint -sha256`` prints may stand there as it is.
    """

    def __init__(self, file: Path | None = None) -> None:
        """Read the list; without a file, nobody is on it.

        Raises:
            ConfigError: If it cannot be read, or holds what is no SHA-256.
        """
        self._file, self._lock = file, threading.Lock()
        self._seen = _stamp(file)
        self._fingerprints, faults = (frozenset[str](), ()) if file is None else _read(file)
        self._told: tuple[str, ...] = ()
        if faults:
            raise ConfigError("\n".join(faults))

    def require_valid(self, peer: Peer) -> None:
        """Raise ``Refused`` if a caller's certificate is on the list as it is now."""
        if peer.fingerprint in self._current():
            raise Refused(
                Code.UNAUTHENTICATED,
                f"This certificate of {peer.name} was revoked. Ask the authority for a new one.",
            )

    def _current(self) -> frozenset[str]:
        """The list, read again if its file has changed.

        Nobody is let in again while something is wrong with it, or while it may still be written.
        """
        with self._lock:
            if self._file is not None and (stamp := _stamp(self._file)) != self._seen:
                found, faults = _read(self._file)
                settled = stamp is not None and not 0 <= time.time() - stamp[0] / 1e9 < SETTLED
                if faults or not settled:
                    found |= self._fingerprints
                self._fingerprints = found
                if settled and not faults:
                    self._seen = stamp
                if faults and faults != self._told:
                    for fault in faults:
                        LOGGER.error("The last revoked certificates stay revoked: %s", fault)
                self._told = faults
            return self._fingerprints


def _stamp(file: Path | None) -> tuple[int, ...] | None:
    """What changes with a file's content, or with who may read it."""
    try:
        status = file.stat() if file is not None else None
    except OSError:
        return None
    return status and (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)


def _read(file: Path) -> tuple[frozenset[str], tuple[str, ...]]:
    """Fingerprints of a list, and what is wrong with it."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return frozenset(), (f"The revoked certificates cannot be read from {file}: {error}",)
    found, faults = [], []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].rpartition("=")[2].strip().replace(":", "").lower()
        if FINGERPRINT.fullmatch(text):
            found.append(text)
        elif text:
            faults.append(
                f"{file}, line {number}: {line.strip()!r} is no SHA-256 of a certificate; expected "
                "64 hexadecimal digits, as in the journal, or what `openssl x509 -noout "
                "-fingerprint -sha256 -in NAME.crt` prints."
            )
    return frozenset(found), tuple(faults)
