"""Watches everything a process does to files, to kill it, fail it, or look at it at each point.

Only for processes of their own: an audit hook cannot be taken back.
"""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["pytest", "timm", "fedcompo.data.client_data", "fedcompo.registry.registry"]
)
PATIENCE = 300.0
"""Seconds after which a process counts as stuck."""
Listener = Callable[[str, Callable[[], object]], None]
"""Told what is about to happen, and how to leave it half done."""

EVENTS = {
    f"os.{name}" for name in ("mkdir", "rename", "remove", "rmdir", "symlink", "link", "truncate")
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_listeners: list[Listener] = []
_open = io.open


@contextmanager
def watched(listener: Listener) -> Iterator[None]:
    """Tell a listener of every operation on files just before it happens."""
    if io.open is _open:
        sys.addaudithook(_audit)
        io.open, os.fsync = _watching_open, _watching_fsync  # type: ignore[assignment]
        sys.dont_write_bytecode = True
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.clear()


class Death:
    """Die at the n-th operation; of a write, the first half still reaches the file.

    Syncing does not count: what a process leaves when it is killed is the same before and after.
    """

    def __init__(self, point: int) -> None:
        self.left = point

    def __call__(self, operation: str, half: Callable[[], object]) -> None:
        self.left -= not operation.startswith("fsync")
        if self.left == 0:
            half()
            os.kill(os.getpid(), signal.SIGKILL)


class DeathAfter:
    """Die once a file of this name has been renamed."""

    def __init__(self, name: str) -> None:
        self.name, self.due = name, False

    def __call__(self, operation: str, half: Callable[[], object]) -> None:
        if self.due:
            os.kill(os.getpid(), signal.SIGKILL)
        self.due = operation.startswith("os.rename") and operation.endswith(f"/{self.name}")


class Failing:
    """Fail at the n-th operation, once or, as a full disk does, in all that take room from then."""

    def __init__(self, point: int, *, full: bool) -> None:
        self.point, self.full, self.count, self.failed = point, full, 0, ""

    def __call__(self, operation: str, half: Callable[[], object]) -> None:
        self.count += 1
        takes_room = operation.split()[0] in ("write", "open", "os.mkdir", "os.symlink")
        if self.count == self.point or (self.full and self.failed and takes_room):
            self.failed = self.failed or operation
            half()
            code = errno.ENOSPC if self.full else errno.EIO
            raise OSError(code, os.strerror(code), operation)


class Durable:
    """What of a folder would be left after a power cut: only what was synced, nothing else.

    Of a file that is its content when it was last synced, of a folder its entries; a file that was
    never synced is empty. Of a rename between folders, both ends take place when one is synced.
    """

    def __init__(self, root: Path) -> None:
        self.entries: dict[int, dict[str, int | str]] = {}
        self.data: dict[int, bytes] = {}
        self._held: dict[int, int] = {}
        self.root = self._number(root)
        for path in [root, *root.rglob("*")]:
            if not path.is_symlink():
                self._sync(path)

    def after_sync(self, handle: int) -> None:
        self._sync(Path(f"/proc/self/fd/{handle}").readlink())

    def write(self, target: Path) -> None:
        """Lay out what is left in a new folder."""
        self._write(self.root, target)

    def _sync(self, path: Path) -> None:
        number = self._number(path)
        if path.is_dir():
            found = {p.name: self._entry(p) for p in path.iterdir()}
            for folder, names in self.entries.items():  # what was moved here is gone from there
                if folder != number:
                    moved = {n for n, e in names.items() if e in found.values() and type(e) is int}
                    self.entries[folder] = {n: e for n, e in names.items() if n not in moved}
            self.entries[number] = found
        else:
            self.data[number] = path.read_bytes()

    def _entry(self, path: Path) -> int | str:
        return f"-> {path.readlink()}" if path.is_symlink() else self._number(path)

    def _number(self, path: Path) -> int:
        number = path.stat().st_ino
        if path.is_dir():
            self.entries.setdefault(number, {})
        if number not in self._held:  # held open, so that its number is not given away again
            self._held[number] = os.open(path, os.O_RDONLY)
        return number

    def _write(self, number: int, target: Path) -> None:
        if number not in self.entries:
            target.write_bytes(self.data.get(number, b""))
            return
        target.mkdir()
        for name, entry in self.entries[number].items():
            if isinstance(entry, str):
                (target / name).symlink_to(entry.removeprefix("-> "))
            else:
                self._write(entry, target / name)


def _tell(operation: str, half: Callable[[], object] = lambda: None) -> None:
    if _listeners:
        listener = _listeners.pop()  # what it does itself does not count
        try:
            listener(operation, half)
        finally:
            _listeners.append(listener)


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event in EVENTS or (event == "open" and args[2] & WRITING):
        _tell(f"{event} {args[0]}")


def _watching_fsync(handle: int) -> None:
    _tell(
        f"fsync {handle}"
    )  # and that is all: it takes long, and changes nothing while power is on


class _Raw(io.FileIO):
    """A file whose system calls can be seen, one by one."""

    def write(self, data: Any) -> int | None:
        first = bytes(data)[: len(data) // 2]
        _tell(f"write {self.name}", lambda: super(_Raw, self).write(first))
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        _tell(f"truncate {self.name}")
        return super().truncate(size)


def _watching_open(
    file: Any,
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Any = None,
) -> Any:
    if not set(mode) & set("wax+"):
        return _open(file, mode, buffering, encoding, errors, newline, closefd, opener)
    raw = _Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
    buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)
