"""Decoded images in a file: rows of uint8 that are read when they are asked for.

A client decodes its images once and reads them in every later phase, each of which may be a process
of its own. The file lies on the client's own disk, only its owner can read it, and it is never
sent. Its name is a digest of all that decides its content. It is written under another name and
renamed, so a crash leaves nothing that is used. Layout::

    rows      count × row bytes
    digests   count × 32 bytes      SHA-256 of each row
    report    JSON                  what decoding found, and the shape of a row
    footer    40 bytes              MARK, SHA-256 of digests and report

A damaged file is deleted and made again; a row is compared with its digest when a process first
reads it, and a damaged one is decoded again, and written. Of two processes that want the same file,
one decodes and the other waits for it.

All files together take at most :data:`SHARE` of what is free on their disk without them: the one
that was not used for longest goes first, and every one that was not used for :data:`DAYS` days.
Where no folder is given the file has no name, and the system deletes it with the process.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fedcompo.errors import DataError
from fedcompo.method.images import Images, Rows
from fedcompo.report.pictures import Facts
from fedcompo.storage.files import OWNER_ONLY, canonical

MARK = b"fcimage1"
DIGEST = 32
FOOTER = len(MARK) + DIGEST
LONGEST_REPORT = 2**20
SHARE = 0.9
DAYS = 30
DONE, PART = ".rows", ".part"
"""Endings of the names of a file, and of one that is being written."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What decoding found."""

    facts: Facts
    """What whoever reads the results should know."""
    notes: tuple[str, ...] = ()
    """What is odd about the images; the log says it each time that they are loaded."""
    tops: dict[str, int] = field(default_factory=dict)
    """What became 255, by kind of pixels with more than 8 bits."""


Put = Callable[[int, Tensor], None]
"""Store the image of a row."""
Make = Callable[[Put], tuple[Report, bytes]]
"""Put every row once; return what was found, and the rows' digests, one after the other."""
Again = Callable[[int, Report], Tensor]
"""Decode the image of a row again."""


class Stored:
    """Images in a file; its rows are read from disk, and stay in the system's own cache."""

    def __init__(
        self,
        file: IO[bytes],
        shape: torch.Size,
        report: Report,
        digests: bytes,
        again: Again,
        path: Path | None,
    ) -> None:
        """Read rows of a shape (count, channels, height, width) from an open file."""
        self._file, self.shape, self.report, self._digests = file, shape, report, digests
        self._again, self.path = again, path
        self._seen = np.zeros(len(self), dtype=bool)  # rows that agree with their digest
        self._damaged = False

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: Any) -> Tensor:
        places = torch.arange(len(self))[which].numpy()
        rows = torch.empty(len(places), *self.shape[1:], dtype=torch.uint8)
        content, handle, size = rows.numpy(), self._file.fileno(), self.shape[1:].numel()
        ends = [*np.flatnonzero(np.diff(places) != 1) + 1, len(places)] if len(places) else []
        first = 0
        for end in map(int, ends):  # neighbours are read together
            read = os.preadv(handle, [content[first:end].data], int(places[first]) * size)
            if read < (end - first) * size:  # it was cut short while it was in use
                content[first:end], self._seen[places[first:end]] = 0, False
            first = end
        for at in np.flatnonzero(~self._seen[places]):
            rows[at] = self._checked(rows[at], int(places[at]))
        return rows

    def _checked(self, row: Tensor, place: int) -> Tensor:
        """Return a row if it agrees with its digest; else decode it again."""
        digest = self._digests[DIGEST * place : DIGEST * (place + 1)]
        if digest_of(row) == digest:
            self._seen[place] = True
            return row
        if not self._damaged:
            logger.warning("%s is damaged; what is damaged is decoded again.", self.path)
        self._damaged = True
        row = self._again(place, self.report)
        if digest_of(row) != digest:
            raise DataError.public(
                "A decoded image is damaged on disk, and its source has changed since. Run again."
            )
        with suppress(OSError):
            os.pwrite(self._file.fileno(), row.numpy().data, place * row.numel())
        return row


def stored(folder: Path | None, name: str, shape: torch.Size, make: Make, again: Again) -> Stored:
    """Read images from the file that holds them, or decode them into it.

    Args:
        folder: Of all such files; None: the file has no name.
        name: Digest of all that decides its content; empty: nothing does, the file has no name.
        shape: (count, channels, height, width).
        make: Decodes them.
        again: Decodes one again.

    Raises:
        DataError: If there is no room for the file, or it cannot be written; what ``make`` raises.
    """
    named = folder is not None and bool(name)
    folder = folder or cache_home()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not named:
            make_room(folder, shape.numel())
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                return _written(os.dup(file.fileno()), shape, make, again, None)
        path = folder / f"{name}{DONE}"
        if found := _read(path, shape, again):
            return found
        with _alone(path.with_suffix(PART)) as handle:
            if found := _read(path, shape, again):  # another process has made it meanwhile
                return found
            make_room(folder, shape.numel())
            images = _written(os.dup(handle), shape, make, again, path)
            path.with_suffix(PART).rename(path)
            return images
    except OSError as error:
        raise DataError(
            f"The decoded images, {_size(shape.numel())}, cannot be kept in {folder} "
            f"({error.strerror or error}). Make room, or name another folder: `state` in the "
            "node's config, or the environment's FEDCOMPO_STATE or XDG_CACHE_HOME.",
            told="decoded images cannot be kept on disk",
        ) from error


def digest_of(image: Tensor) -> bytes:
    """SHA-256 of an image's bytes."""
    return sha256(image.numpy().data).digest()


def cache_home() -> Path:
    """Folder of files that outlast a run: ``XDG_CACHE_HOME``, else the user's own."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home).expanduser() / "fedcompo" / "images"


def forget(*images: Images) -> None:
    """Delete the files of images; who has them open can still read them."""
    for some in images:
        for part in some.parts if isinstance(some, Rows) else (some,):
            if isinstance(part, Stored) and part.path:
                part.path.unlink(missing_ok=True)


def make_room(folder: Path, needed: int) -> None:
    """Delete files until another one of so many bytes fits; see the top.

    Raises:
        DataError: If it would not fit even alone.
    """
    ages = dict[Path, float]()
    for path in folder.glob(f"*{PART}"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if somebody writes it
            path.unlink()
    for path in folder.glob(f"*{DONE}"):
        with suppress(OSError):
            ages[path] = path.stat().st_mtime
    held = {path: path.stat().st_size for path in ages}
    total, limit = sum(held.values()), SHARE * (shutil.disk_usage(folder).free + sum(held.values()))
    if needed > limit:
        raise DataError(
            f"The decoded images take {_size(needed)}, and {folder} has room for {_size(limit)}. "
            "Make room, use a smaller `image-size` or fewer images (`images-per-class`), or name "
            "another folder: `state` in the node's config, or the environment's FEDCOMPO_STATE or "
            "XDG_CACHE_HOME.",
            told="there is no room on disk for the decoded images",
        )
    for path in sorted(ages, key=ages.__getitem__):
        if total + needed > limit or time.time() - ages[path] > DAYS * 86400:
            path.unlink(missing_ok=True)
            total -= held[path]


def _written(handle: int, shape: torch.Size, make: Make, again: Again, path: Path | None) -> Stored:
    """Decode images into an open file."""
    file, size = os.fdopen(handle, "r+b", buffering=0), shape[1:].numel()
    os.ftruncate(handle, 0)

    def put(row: int, image: Tensor) -> None:
        if os.pwrite(handle, image.numpy().data, row * size) != size:
            raise OSError("no space left")

    report, digests = make(put)
    tail = digests + canonical({"shape": list(shape), **asdict(report)}).encode()
    os.pwrite(handle, tail + MARK + sha256(tail).digest(), shape.numel())
    return Stored(file, shape, report, digests, again, path)


def _read(path: Path, shape: torch.Size, again: Again) -> Stored | None:
    """Open a file and check all but its rows; delete a damaged one. None: there is none."""
    try:
        file = path.open("r+b", buffering=0)
    except FileNotFoundError:
        return None
    try:
        digests = DIGEST * shape[0]
        content = os.pread(file.fileno(), digests + LONGEST_REPORT, shape.numel())
        tail, footer = content[:-FOOTER], content[-FOOTER:]
        if footer != MARK + sha256(tail).digest():
            raise ValueError("it is cut short or damaged")
        stated = json.loads(tail[digests:])
        if stated.pop("shape") != list(shape):
            raise ValueError("it holds other images")
        report = Report(**{**stated, "notes": tuple(stated["notes"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        file.close()
        logger.warning("%s is not used (%s); the images are decoded again.", path, error)
        path.unlink(missing_ok=True)
        return None
    with suppress(OSError):
        os.utime(path)  # when it was used
    return Stored(file, shape, report, tail[:digests], again, path)


@contextmanager
def _alone(path: Path) -> Iterator[int]:
    """Open a file that no other process has; wait until it does not. Delete it afterwards."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, OWNER_ONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if _is(path, handle):
                break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    try:
        yield handle
    finally:
        if _is(path, handle):  # it was not renamed
            path.unlink()
        fcntl.flock(handle, fcntl.LOCK_UN)  # the images keep it open
        os.close(handle)


def _is(path: Path, handle: int) -> bool:
    """Whether a file still has the name that it was opened by."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
