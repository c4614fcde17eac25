"""A file of many clients' examples, read once by a process that serves many of them.

A simulation hands a process hundreds of clients, phase after phase. What was read last is kept
until another file is asked for; a large file is read each time, for as long as it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from fedcompo.data.catalogue import Catalogue

Reader = Callable[[Path], Catalogue]
KEPT_BYTES = 256 * 2**20
"""Size of the largest file whose content is kept."""


def read_once(read: Reader, path: Path) -> Catalogue:
    """Read a file, unless it is the one that was read last and has not changed since.

    Args:
        read: Reads it; raises if it cannot.
        path: The file. It has changed if its size, its inode or the time of its last change has.
    """
    try:
        found = path.stat()
    except OSError:
        return read(path)  # and say what is wrong with it
    if found.st_size > KEPT_BYTES:
        return read(path)
    return _kept(read, path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=1)
def _kept(read: Reader, path: Path, version: tuple[int, ...]) -> Catalogue:
    return read(path)
