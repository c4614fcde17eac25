"""A list of pictures or texts with their classes, and a way to read each.

Every source of data becomes a :class:`Catalogue`. Pixels are read only of the images that a client
keeps.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from fedcompo.backbone.preprocessing import Modality, Preprocessing
from fedcompo.data.draws import Indices
from fedcompo.errors import DataError

FAULTS_SHOWN = 5
"""Number of unreadable images that an error lists; it counts the rest."""
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
    """Read one image, upright and of 8 bits a channel, or one text as bytes. May raise any
    exception."""
    describe: Callable[[int], str]
    """Describe one image, for messages."""
    modality: Modality = Modality.PICTURES
    """Pictures or texts."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Sorted names of the classes that have at least one image."""
        return tuple(str(name) for name in np.unique(self.classes))

    def count(self, indices: Iterable[int]) -> str:
        """Count images by class, for those who may know no more of them than that."""
        counts = Counter(str(self.classes[index]) for index in indices)
        parts = [f"{n} image(s) of class {c!r}" for c, n in counts.most_common(FAULTS_SHOWN)]
        return ", ".join(parts) + (", and others" if len(counts) > FAULTS_SHOWN else "")

    def decode(self, chosen: Indices, preprocessing: Preprocessing, *, client: str) -> Tensor:
        """Read and resize images.

        Args:
            chosen: Indices of the images, (count,).
            preprocessing: Input that the backbone expects.
            client: Who owns the images, for messages.

        Returns:
            (count, channels, image_size, image_size), or of texts (count, 1, 1, length); uint8.

        Raises:
            DataError: If images cannot be read; lists the first few and how many there are. If the
                backbone reads texts and these are none, or the other way round.
        """
        if self.modality != preprocessing.modality:
            raise DataError(
                f"{self.source} holds {self.modality}, but the backbone reads "
                f"{preprocessing.modality}. Change `data`, or `backbone`."
            )
        images = torch.empty(len(chosen), *preprocessing.shape, dtype=torch.uint8)
        faults, unreadable = [], []
        for row, index in enumerate(chosen.tolist()):
            try:
                example = self.open(index)
            except Exception as error:  # Pillow's decoders raise errors of every kind
                faults.append(f"{self.describe(index)}: {error or type(error).__name__}")
                unreadable.append(index)
            else:
                images[row] = preprocessing.prepare(example)
        if faults:
            listed = "".join(f"\n  - {fault}" for fault in faults[:FAULTS_SHOWN])
            more = len(faults) - FAULTS_SHOWN
            raise DataError(
                f"Client {client!r}: {len(faults)} of {len(chosen)} images in {self.source} cannot "
                f"be read:{listed}{f'{chr(10)}  - and {more} more' if more > 0 else ''}\n"
                "Repair them or take them out; images are never skipped.",
                told=f"{self.count(unreadable)} cannot be read",
            )
        return images


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
    return unicodedata.normalize("NFC", raw)


def read_picture(source: Path | IO[bytes]) -> Image.Image:
    """Read an image file, rotate it as its EXIF tag says, convert it to 8 bits a channel.

    Of an animation only the first frame is read.

    Raises:
        Exception: Any that Pillow raises on a file that is damaged or no image.
    """
    with Image.open(source) as opened:
        opened.load()
        return to_8_bits(ImageOps.exif_transpose(opened))


def to_8_bits(picture: Image.Image) -> Image.Image:
    """Scale a 16-bit grey picture to 8 bits; Pillow's own conversion would clip at 255.

    0..65535 is mapped to 0..255 whatever values occur, so that pictures stay comparable; 12-bit
    data in a 16-bit file becomes dark. Other pictures are returned unchanged.

    Raises:
        ValueError: If pixels are floating-point numbers, or integers outside 0..65535.
    """
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture
    pixels = np.asarray(picture)
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        raise ValueError(f"its pixels span {low}..{high}; save it with 8 or 16 bits (0..65535)")
    return Image.fromarray(np.rint(pixels / 257).astype(np.uint8))
