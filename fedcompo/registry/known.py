"""What this machine knows of registries: whose key is theirs, and the last that was seen of them.

One JSON file, at ``$FEDCOMPO_KNOWN``, else ``~/.config/fedcompo/known.json``. A key is pinned when
its registry is made here, or at the first call to its service, and insisted on from then on. A
file that cannot be read or written is named in a warning; nothing else fails because of it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedcompo.errors import FileFormatError
from fedcompo.registry.journal import utc_now
from fedcompo.storage.files import replaced, write_private

logger = logging.getLogger(__name__)
VARIABLE = "FEDCOMPO_KNOWN"


@dataclass(frozen=True)
class Known:
    """What is known of one registry."""

    fingerprint: str
    """That of its key."""
    since: str = field(default_factory=utc_now)
    """UTC time at which the registry was first met."""
    former: Mapping[str, int] = field(default_factory=dict)
    """Fingerprints of keys that it had before, each with the journal's line that exchanged it."""
    checkpoint: str = ""
    """The last signed checkpoint that was seen; empty: none yet."""
    sequence: int = 0
    """The journal's last line according to it; 0: none yet."""
    root: str = ""
    journal_sha256: str = ""

    def signs(self, fingerprint: str, sequence: int) -> bool:
        """Whether a key is the one that signed when the journal got a line."""
        lines = self.former.values()
        if fingerprint == self.fingerprint:
            return sequence > max(lines, default=0)
        end = self.former.get(fingerprint, 0)
        return max((line for line in lines if line < end), default=0) < sequence < end


@dataclass(frozen=True)
class Pins:
    """All that this machine knows."""

    registries: Mapping[str, Known] = field(default_factory=dict)
    """By the registry's identity."""
    servers: Mapping[str, str] = field(default_factory=dict)
    """Identity of the registry that a server was met with, by ``host:port``."""


def place() -> Path:
    """The file; raises ``FileFormatError`` for a user without a home, as a container may have."""
    try:
        return Path(os.environ.get(VARIABLE) or Path.home() / ".config/fedcompo/known.json")
    except RuntimeError as error:
        raise FileFormatError(f"{error} Name a file for keys of registries: {VARIABLE}.") from error


def read() -> Pins:
    """Read the file; what is not there is empty.

    Raises:
        FileFormatError: If it cannot be read.
    """
    path = place()
    try:
        values = json.loads(path.read_bytes().decode())
        found = {name: Known(**own) for name, own in values["registries"].items()}
        return Pins(found, dict(values["servers"]))
    except FileNotFoundError:
        return Pins()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(
            f"{path}, the keys of registries that this machine knows, cannot be read "
            f"({type(error).__name__}: {error}). Restore it from a copy, or move it away, which "
            "forgets all keys."
        ) from error


def known(identity: str) -> Known | None:
    """What is known of a registry; None: nothing, or the file cannot be read, which is said."""
    try:
        return read().registries.get(identity)
    except FileFormatError as error:
        logger.warning("%s", error)
        return None


def keep(identity: str, seen: Known, *, server: str = "") -> None:
    """Write down what is known of a registry, unless more is known already.

    Args:
        identity: The registry's.
        seen: What is known of it.
        server: ``host:port`` of its service, if it was met there.
    """
    try:
        with _locked(path := place()):
            pins = read()
            held = pins.registries.get(identity)
            if held is not None and held.sequence > seen.sequence:
                seen = held  # another process has seen more
            servers = {**pins.servers, **({server: identity} if server else {})}
            pins = Pins({**pins.registries, identity: seen}, servers)
            with replaced(path) as draft:
                write_private(draft, f"{json.dumps(asdict(pins), indent=1)}\n".encode())
    except (OSError, FileFormatError) as error:
        logger.warning(
            "The key of registry %s, SHA-256 %s, could not be written down: %s. Make the file of "
            "known keys writable, or name another one by %s.",
            *(identity, seen.fingerprint, error, VARIABLE),
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process change the file at a time."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
