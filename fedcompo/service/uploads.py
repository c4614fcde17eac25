"""What clients have sent and was not taken in yet: beside the registry, never in it.

::

    <folder>/<SHA-256 of the client's name>/<SHA-256 of the announced files>/<file>

A client has one upload at a time; another one takes its place. So nobody can fill the disk with
what was begun and left, and what is left is deleted after a day. The lock on a client's folder is
the system's: it goes with the call, however that ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fedcompo.service.limits import Limits
from fedcompo.service.refusals import Code, Refused
from fedcompo.service.transfer import FileEntry, Incoming, identity

PATIENCE = 10.0
"""Seconds to wait for an earlier call of the same client, whose end the server has yet to note."""
TICK = 0.05


class Uploads:
    """The uploads under way, in a folder of their own."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        """Name the folder; it is made when something comes."""
        self.folder, self._limits = folder, limits

    @contextmanager
    def opened(
        self, client: str, entries: Sequence[FileEntry], *, patience: float = PATIENCE
    ) -> Iterator[Incoming]:
        """Take up an upload, or begin it; no other call touches it meanwhile.

        Raises:
            Refused: If it is too large, or another call of the client's is at it.
        """
        self._check_size(client, entries)
        home = self._home(client)
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(home, client, patience):
            folder = home / identity(entries)
            for other in home.iterdir():
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
            folder.mkdir(exist_ok=True, mode=0o700)
            incoming = Incoming(folder, entries)
            self._check_room(entries, incoming)
            yield incoming

    def forget(self, client: str) -> None:
        """Delete what a client has sent, unless it is sending just now."""
        home = self._home(client)
        with suppress(Refused, FileNotFoundError), _locked(home, client, patience=0):
            for upload in home.iterdir():
                shutil.rmtree(upload, ignore_errors=True)

    def sweep(self) -> None:
        """Delete uploads that nobody goes on with; the clients' own folders stay, empty."""
        before = time.time() - self._limits.stale
        for upload in self.folder.glob("*/*"):
            with suppress(Refused, FileNotFoundError), _locked(upload.parent, "", patience=0):
                files = [path.stat().st_mtime for path in upload.iterdir()]
                if max([upload.stat().st_mtime, *files]) < before:
                    shutil.rmtree(upload, ignore_errors=True)

    def _home(self, client: str) -> Path:
        """Names that differ in case alone are one folder on some systems; their digests differ."""
        return self.folder / hashlib.sha256(client.encode()).hexdigest()[:32]

    def _check_size(self, client: str, entries: Sequence[FileEntry]) -> None:
        size = sum(entry.size for entry in entries)
        if size > self._limits.contribution:
            raise Refused(
                Code.RESOURCE_EXHAUSTED,
                f"The contribution of {client} has {size} bytes, and may have "
                f"{self._limits.contribution}. Ask an operator to add it at the registry.",
            )

    def _check_room(self, entries: Sequence[FileEntry], incoming: Incoming) -> None:
        """What is missing must fit on the disk, and a copy of all of it, for the registry."""
        needed = incoming.missing + sum(entry.size for entry in entries)
        if shutil.disk_usage(incoming.folder).free < needed + self._limits.spare:
            raise Refused(
                Code.RESOURCE_EXHAUSTED,
                f"The server's disk has no room for the {needed} bytes that this upload needs. "
                "Try again later, or tell its operator.",
            )


@contextmanager
def _locked(home: Path, client: str, patience: float) -> Iterator[None]:
    deadline, handle = time.monotonic() + patience, os.open(home, os.O_RDONLY)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Refused(
                        Code.ABORTED,
                        f"Another call of {client} is at its upload. Wait for it to end.",
                    ) from None
            time.sleep(TICK)
        yield
    finally:
        os.close(handle)
