"""A list of pictures or texts with their classes, and a way to read each.

Every source of data becomes a :class:`Catalogue`. Pixels are read only of the images that a client
keeps.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedcompo.backbone.preprocessing import Modality
from fedcompo.errors import ContributionError, DataError
from fedcompo.names import check_class_names
from fedcompo.report.twins import few

KEPT_BYTES = 256 * 2**20
"""Size of the largest file whose content :func:`read_once` keeps."""


@dataclass(frozen=True)
class Catalogue:
    """The images of one source: their classes are read, their pixels are not yet."""

    source: str
    """Where the images come from, for messages."""
    classes: NDArray[np.str_]
    """(count,) class name of each image, see :func:`class_name`."""
    is_test: NDArray[np.bool_] | None
    """(count,) whether each is a test image; None: the source does not say."""
    open: Callable[[int], Image.Image | bytes]
    """Read one image as pixels or as its file's content, or one text. May raise any exception."""
    modality: Modality = Modality.PICTURES
    """Pictures or texts."""
    which: Callable[[int], object] = "image {}".format
    """Name one image, for messages."""
    columns: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)
    """(count,) what else the source says of each image, by the column's name."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Sorted names of the classes that have at least one image."""
        return tuple(str(name) for name in np.unique(self.classes))

    def describe(self, index: int) -> str:
        """Name one image and its class, for messages."""
        return f"{self.which(index)} (class {str(self.classes[index])!r})"

    def count(self, indices: Iterable[int]) -> str:
        """Count images by class, for those who may know no more of them than that."""
        counts = Counter(str(self.classes[index]) for index in indices)
        return few([f"{n} image(s) of class {c!r}" for c, n in counts.most_common()])


Reader = Callable[[Path], Catalogue]
"""Lists the examples of a file; raises ``DataError`` if it cannot."""


def read_once(read: Reader, path: Path) -> Catalogue:
    """Read a file, or return what was read last if it is the same file, unchanged.

    One process of a simulation serves hundreds of clients from one file, phase after phase. A file
    of more than :data:`KEPT_BYTES` is read each time, so that its content does not stay in memory.

    Args:
        read: Reads the file.
        path: The file. It counts as changed if its size, inode or modification time differs.
    """
    try:
        status = path.stat()
    except OSError:
        return read(path)  # its error says what is wrong
    if status.st_size > KEPT_BYTES:
        return read(path)
    return _kept(read, path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=1)
def _kept(read: Reader, path: Path, version: tuple[int, ...]) -> Catalogue:
    return read(path)


def class_name(raw: str, *, source: str) -> str:
    """Normalise the name of a class or client to Unicode's composed form (NFC).

    Systems encode the same name differently (macOS decomposes "é"), but clients must agree on it.

    Raises:
        DataError: If the name is empty or no valid Unicode.
    """
    try:
        raw.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"The name {raw!r} in {source} is no valid Unicode. Rename it; UTF-8 was expected."
        ) from None
    if not raw.strip():
        raise DataError(f"A name in {source} is empty, got {raw!r}. Give the class a name.")
    name = unicodedata.normalize("NFC", raw)
    try:
        check_class_names([name], source)  # here, before the server would refuse the client
    except ContributionError as error:
        raise DataError(str(error)) from None
    return name
