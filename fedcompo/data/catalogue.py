"""A list of pictures or texts with their classes, and a way to read each.

Every source of data becomes a :class:`Catalogue`. Pixels are read only of the images that a client
keeps.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedcompo.config.choices import Modality
from fedcompo.errors import ContributionError, DataError
from fedcompo.names import check_class_names
from fedcompo.report.twins import few

KEPT_BYTES = 256 * 2**20
"""Most content of images in memory that :func:`read_once` keeps."""


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
    """Read one image as pixels or as its file's content, or one text. May raise any exception.

    Several threads call it at the same time.
    """
    modality: Modality = Modality.PICTURES
    """Pictures or texts."""
    which: Callable[[int], object] = "image {}".format
    """Name one image, for messages."""
    file: Callable[[int], Path] | None = None
    """The file of one image; None: they have none of their own."""
    version: str = ""
    """Changes whenever the content of an image may have changed; empty: not known, keep nothing."""
    marks: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    """By fact that a note tells (:mod:`fedcompo.report.pictures`), which images it befalls."""
    in_memory: int = 0
    """Bytes of images' content that ``open`` reads from memory."""
    clients: NDArray[np.str_] | None = None
    """(count,) who owns each image; None: the source does not say."""
    columns: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)
    """What else a table says of each image, by its column's name; each (count,)."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Sorted names of the classes that have at least one image."""
        return tuple(str(name) for name in np.unique(self.classes))

    @cached_property
    def owners(self) -> tuple[str, ...]:
        """Sorted names of the clients; none: the source does not say."""
        return () if self.clients is None else tuple(map(str, np.unique(self.clients)))

    def of_client(self, client: str) -> Catalogue:
        """Return the catalogue of one client's images."""
        return self.part(np.flatnonzero(self.clients == client))

    def part(self, rows: NDArray[np.int64]) -> Catalogue:
        """Return the catalogue of some images, given their indices."""
        own_file = self.file

        def chosen(values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            return {name: column[rows] for name, column in values.items()}

        return replace(
            self,
            classes=self.classes[rows],
            is_test=None if self.is_test is None else self.is_test[rows],
            open=lambda index: self.open(int(rows[index])),
            which=lambda index: self.which(int(rows[index])),
            file=None if own_file is None else lambda index: own_file(int(rows[index])),
            version=self.version and sha256(self.version.encode() + rows.tobytes()).hexdigest(),
            marks=chosen(self.marks),
            clients=None if self.clients is None else self.clients[rows],
            columns=chosen(self.columns),
        )

    def describe(self, index: int) -> str:
        """Name one image and its class, for messages."""
        return f"{self.which(index)} (class {str(self.classes[index])!r})"

    def count(self, indices: Iterable[int]) -> str:
        """Count images by class, for those who may know no more of them than that."""
        counts = Counter(str(self.classes[index]) for index in indices)
        return few([f"{n} image(s) of class {c!r}" for c, n in counts.most_common()])


def version_of(files: Iterable[str | Path]) -> str:
    """Digest path, size, times and inode of files: it differs if the content of one may (SHA-256).

    A file that is missing has no size; who opens it says so. Without files, it is empty.
    """
    if not (files := [*map(Path, files)]):
        return ""
    digest = sha256()
    for file in files:
        digest.update(os.fsencode(file.absolute()) + b"\0")
        with suppress(OSError):
            s = file.stat()
            digest.update(b"%d %d %d %d\0" % (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino))
    return digest.hexdigest()


def places(counts: Sequence[int]) -> Callable[[int], tuple[int, int]]:
    """Return what finds the part in which an index lies, and its row there, given their lengths."""
    ends = np.cumsum(counts)

    def place(index: int) -> tuple[int, int]:
        part = int(np.searchsorted(ends, index, side="right"))
        return part, index - int(ends[part] - counts[part])

    return place


Reader = Callable[..., Catalogue]
"""Lists the examples of a file, given its path and perhaps more; may raise ``DataError``."""


def read_once(read: Reader, path: Path, *options: Hashable) -> Catalogue:
    """Read a file, or return what was read last if it is the same file, unchanged.

    One process of a simulation serves hundreds of clients from one file, phase after phase. What
    holds more than :data:`KEPT_BYTES` of content is read each time, and so does not stay in memory.

    Args:
        read: Reads the file.
        path: The file, or a folder of files. It counts as changed if the size, inode or times of
            one differ.
        options: What else ``read`` is given.
    """
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    key = (read, path, options, version_of(files))
    if catalogue := _kept.get(key):
        return catalogue
    _kept.clear()
    catalogue = read(path, *options)
    if catalogue.in_memory <= KEPT_BYTES:
        _kept[key] = catalogue
    return catalogue


_kept: dict[Hashable, Catalogue] = {}
"""What :func:`read_once` read last."""


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
