"""Decoded images in a file: rows of uint8 that are read when they are asked for.

A client decodes its images once and reads them in every later phase, each of which may be a process
of its own. The file lies on the client's own disk, only its owner can read it, and it is never
sent. Its name is a digest of all that decides its content. It is written under another name and
renamed when it is on the disk, so a crash leaves nothing that is used. Layout::

    rows      count x row bytes
    report    JSON                  what decoding found
    digest    32 bytes              SHA-256 of the report

All files together take at most :data:`SHARE` of what is free on their disk without them. Before one
is written, the one that was not used for longest goes first, and every one that was not used for
:data:`DAYS` days.
Where no folder is given the file has no name, and the system deletes it with the process.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fedcompo.errors import DataError
from fedcompo.method.images import Images, Rows
from fedcompo.report.pictures import Facts
from fedcompo.report.units import size
from fedcompo.storage.files import canonical

DIGEST = 32
LONGEST_REPORT = 2**20
SHARE = 0.9
DAYS = 30
DONE, PART = ".rows", ".part"
"""Endings of the names of a file, and of one that is being written."""
STALE = 3600
"""Seconds after which nobody writes a part any more: its process was killed."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What decoding found."""

    facts: Facts
    """What whoever reads the results should know."""
    notes: tuple[str, ...] = ()
    """What is odd about the images; the log says it each time that they are loaded."""


Put = Callable[[int, Tensor], None]
"""Store the image of a row."""
Make = Callable[[Put], Report]
"""Put every row once; return what was found."""


class Stored:
    """Images in a file; its rows are read from disk, and stay in the system's own cache."""

    def __init__(
        self, file: IO[bytes], shape: torch.Size, report: Report, path: Path | None
    ) -> None:
        """Read rows of a shape (count, channels, height, width) from an open file."""
        self._file, self.shape, self.report, self.path = file, shape, report, path

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: Any) -> Tensor:
        places = torch.arange(len(self))[which].numpy()
        # Mapped for each read: pages that stay mapped would count as memory of this process.
        rows = np.memmap(self._file, np.uint8, "r", shape=tuple(self.shape))
        return torch.from_numpy(np.asarray(rows)[places])


def stored(folder: Path | None, name: str, shape: torch.Size, make: Make) -> Stored:
    """Read images from the file that holds them, or decode them into it.

    Args:
        folder: Of all such files; None: the file has no name.
        name: Digest of all that decides its content; empty: nothing does, the file has no name.
        shape: (count, channels, height, width).
        make: Decodes them.

    Raises:
        DataError: If there is no room for the file, or it cannot be written; what ``make`` raises.
    """
    named = folder is not None and bool(name)
    folder = folder or cache_home()
    path = folder / f"{name}{DONE}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if named and (found := _read(path, shape)):
            return found
        make_room(folder, shape.numel())
        handle, name = tempfile.mkstemp(PART, dir=folder)
        part = Path(name)
        file = os.fdopen(handle, "r+b", buffering=0)
        try:
            report = _write(handle, shape, make)
            if named:
                os.fsync(handle)
                part.replace(path)
        except BaseException:
            file.close()
            raise
        finally:
            part.unlink(missing_ok=True)
        return Stored(file, shape, report, path if named else None)
    except OSError as error:
        raise DataError(
            f"The decoded images, {size(shape.numel())}, cannot be kept in {folder} "
            f"({error.strerror or error}). Make room, use a smaller `image-size` or fewer images "
            "(`images-per-class`), or name another folder: `state` in the node's config, or the "
            "environment's FEDCOMPO_STATE or XDG_CACHE_HOME.",
            told="decoded images cannot be kept on disk",
        ) from error


def read(folder: Path, name: str, shape: torch.Size) -> Stored | None:
    """Read images from the file that holds them; None: there is none."""
    with suppress(OSError):
        return _read(folder / f"{name}{DONE}", shape)
    return None


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
        OSError: If it would not fit even alone.
    """
    files = dict[Path, os.stat_result]()
    for path in folder.iterdir():
        with suppress(OSError):  # another process has deleted it
            files[path] = path.stat()
    total = sum(held.st_size for path, held in files.items() if path.suffix == DONE)
    limit = SHARE * (shutil.disk_usage(folder).free + total)
    if needed > limit:
        raise OSError(f"there is room for {size(int(limit))}")
    for path, held in sorted(files.items(), key=lambda item: item[1].st_mtime):
        age = time.time() - held.st_mtime
        if path.suffix == PART and age > STALE:
            path.unlink(missing_ok=True)
        elif path.suffix == DONE and (total + needed > limit or age > DAYS * 86400):
            path.unlink(missing_ok=True)
            total -= held.st_size


def _write(handle: int, shape: torch.Size, make: Make) -> Report:
    """Decode images into an open file."""

    def write(content: Any, place: int) -> None:
        if os.pwrite(handle, content, place) != len(content):
            raise OSError("no space left")

    row = shape[1:].numel()
    report = make(lambda at, image: write(image.flatten().numpy().data, at * row))
    tail = canonical(asdict(report)).encode()
    write(tail + sha256(tail).digest(), shape.numel())
    return report


def _read(path: Path, shape: torch.Size) -> Stored | None:
    """Open a file and check its end; delete a damaged one. None: there is none."""
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError:
        return None
    tail = os.pread(file.fileno(), LONGEST_REPORT, shape.numel())
    if sha256(tail[:-DIGEST]).digest() != tail[-DIGEST:]:
        file.close()
        logger.warning("%s is damaged; the images are decoded again.", path)
        path.unlink(missing_ok=True)
        return None
    with suppress(OSError):
        os.utime(path)  # when it was used
    stated = json.loads(tail[:-DIGEST])
    return Stored(file, shape, Report(stated["facts"], tuple(stated["notes"])), path)
