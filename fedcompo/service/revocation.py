"""Certificates that count no more before they expire: a key was lost, or its holder shall go.

They stand in a file of the operator's, which is read again whenever it has changed, so that nobody
need restart the service to lock a thief out.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path

from fedcompo.errors import ConfigError
from fedcompo.service.identity import Peer
from fedcompo.service.refusals import LOGGER, Code, Refused

FINGERPRINT = re.compile(r"[0-9a-f]{64}", re.ASCII)
"""SHA-256 of a certificate, as it stands in the journal; colons are left out before."""


class Revoked:
    """The SHA-256 of certificates that are refused; one a line, and ``#`` begins a comment.

    Capitals and colons do not matter: ``openssl x509 -noout -fingerprint -sha256`` prints both.
    """

    def __init__(self, file: Path | None = None) -> None:
        """Read the list; without a file, nobody is on it.

        Raises:
            ConfigError: If it cannot be read, or holds what is no SHA-256.
        """
        self._file, self._lock = file, threading.Lock()
        self._seen = _stamp(file)
        self._fingerprints = frozenset() if file is None else _read(file)

    def require_valid(self, peer: Peer) -> None:
        """Raise ``Refused`` if a caller's certificate is on the list as it is now."""
        if peer.fingerprint in self._current():
            raise Refused(
                Code.UNAUTHENTICATED,
                f"This certificate of {peer.name} was revoked. Ask the authority for a new one.",
            )

    def _current(self) -> frozenset[str]:
        """The list, read again if its file has changed; what cannot be read leaves the last one."""
        with self._lock:
            if self._file is not None and (stamp := _stamp(self._file)) != self._seen:
                try:
                    self._fingerprints = _read(self._file)
                except ConfigError as error:
                    LOGGER.error("The last list of revoked certificates stays in force: %s", error)
                self._seen = stamp
            return self._fingerprints


def _stamp(file: Path | None) -> tuple[int, int, int] | None:
    """What changes with a file's content."""
    try:
        status = file.stat() if file is not None else None
    except OSError:
        return None
    return status and (status.st_mtime_ns, status.st_size, status.st_ino)


def _read(file: Path) -> frozenset[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The revoked certificates cannot be read from {file}: {error}"
        ) from error
    found = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip().replace(":", "").lower()
        if text and not FINGERPRINT.fullmatch(text):
            raise ConfigError(
                f"{file}, line {number}: {line.strip()!r} is no SHA-256 of a certificate; expected "
                "64 hexadecimal digits, as in the journal, or as `openssl x509 -noout "
                "-fingerprint -sha256 -in NAME.crt` prints them after the =."
            )
        found.append(text)
    return frozenset(filter(None, found))
