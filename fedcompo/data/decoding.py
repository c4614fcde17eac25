"""Read the pictures that a client keeps, or its texts, into one tensor of uint8.

Pictures are turned upright as their EXIF tag says; of several pages or frames the first is read;
transparency is ignored. Pixels of more than 8 bits are scaled by a range that *all* pictures of a
client share, training and test: the smallest of 8, 10, 12, 14 and 16 bits that holds their largest
value (of floating-point numbers, also 0..1). A range for each picture would make dark ones bright.

What is odd about pictures is logged, with how many it befell. The log stays with the client.
"""

from __future__ import annotations

import io
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from hashlib import sha256

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fedcompo.backbone.preprocessing import Modality, Preprocessing
from fedcompo.data.catalogue import Catalogue
from fedcompo.data.draws import Indices
from fedcompo.errors import DataError
from fedcompo.report.pictures import REPEATED, WIDE
from fedcompo.report.twins import few

BITS = (8, 10, 12, 14, 16)
"""Ranges that cameras and scanners use."""
COLOURS = "16-bit colours"
"""Of them Pillow reads the upper 8 bits."""
PAGES = "hold several pages or frames: the first is used"
TURNED = "are turned upright, as their EXIF tag says; most other programs do not turn them"
SEE_THROUGH = "are partly transparent: transparency is ignored, the colours under it are used"
NEGATIVE = "say that 0 is white, with more than 8 bits; they are read as if 0 were black"
FOREIGN = (
    (0, b"version https://git-lfs", "it is a git-lfs pointer; run `git lfs pull`"),
    (0, b"II*\0", "its pixels are of a kind that Pillow cannot read"),  # as all TIFF files start
    (0, b"MM\0*", "its pixels are of a kind that Pillow cannot read"),
    (0, b"PK", "it is a zip archive; unpack it"),
    (0, b"\x1f\x8b", "it is packed by gzip, as NIfTI files are; export its slices"),
    (0, b"%PDF", "it is a PDF; export its pages"),
    (0, b"<", "it is a web page or a drawing (HTML, XML, SVG); fetch or save the picture itself"),
    (4, b"ftyp", "it is a HEIF picture or a video"),
    (128, b"DICM", "it is a DICOM file"),
    (0, b"", "Pillow knows no such picture"),
)
"""What a file is that Pillow does not know: where some bytes of it stand, and the bytes."""
logger = logging.getLogger(__name__)


def decode(
    catalogue: Catalogue,
    train: Sequence[Indices],
    test: Sequence[Indices],
    preprocessing: Preprocessing,
    *,
    client: str,
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Read and resize images.

    Args:
        catalogue: Where they are.
        train: Indices of the training images of each class, (count,).
        test: Indices of the test images of each class.
        preprocessing: Input that the backbone expects.
        client: Who owns the images, for messages.

    Returns:
        Training images, test images, each (count, channels, image_size, image_size), or of texts
        (count, 1, 1, length), uint8; and facts on them that the results note.

    Raises:
        DataError: If images cannot be read or converted; lists the first few and how many there
            are. If the backbone reads texts and these are none, or the other way round.
    """
    if catalogue.modality != preprocessing.modality:
        raise DataError(
            f"{catalogue.source} holds {catalogue.modality}, but the backbone reads "
            f"{preprocessing.modality}. Change `data`, or `backbone`."
        )
    reader = _Reader(catalogue, np.concatenate([*train, *test]), f"Client {client!r}")
    images = torch.empty(len(reader.chosen), *preprocessing.shape, dtype=torch.uint8)
    facts = reader.fill(images, preprocessing)
    kept, held = images.tensor_split([sum(map(len, train))])
    seen, tests = ([sha256(image.numpy()).digest() for image in part] for part in (kept, held))
    if repeated := sum(map(set(seen).__contains__, tests)):
        facts[REPEATED] = repeated
        logger.warning(
            "Client %r: %d of %d test images in %s are training images too, as the backbone sees "
            "them; accuracies are too high. Take them out of one of the two.",
            *(client, repeated, len(held), catalogue.source),
        )
    return kept, held, facts


class _Reader:
    """Reads the examples of a client; counts what is odd, and how large pixels get."""

    def __init__(self, catalogue: Catalogue, chosen: Indices, whose: str) -> None:
        self._catalogue, self.chosen, self._whose = catalogue, chosen, whose
        self._of = f"{len(chosen)} images in {catalogue.source}"
        self._about = ""  # format, mode and size of the picture opened last, for messages
        self._odd: defaultdict[str, set[int]] = defaultdict(set)  # pictures, by what is odd
        self._peaks: dict[str, float] = {}  # largest value by kind of pixels with more than 8 bits
        self._tops: dict[str, int] = {}  # what becomes 255 of them; empty: not known yet

    def fill(self, images: Tensor, preprocessing: Preprocessing) -> dict[str, int]:
        """Fill the rows; return the value that became 255, by kind of pixels with more than 8 bits.

        Pictures with such pixels are read twice: their range is known when all are seen.
        """
        waiting = self._fill(images, range(len(images)), preprocessing)
        for kind, peak in self._peaks.items():
            which = f"{self._whose}: {len(self._odd[kind])} of {self._of} have {kind}"
            self._tops[kind] = _top(kind, peak, which)
        self._fill(images, waiting, preprocessing)
        for what, who in self._odd.items():
            top = self._tops.get(what)
            told = f"have {what}: 0..{top} becomes 0..255" if top else what
            logger.warning("%s: %d of %s %s.", self._whose, len(who), self._of, told)
        return {kind: top for kind, top in self._tops.items() if kind != COLOURS}

    def _fill(self, images: Tensor, rows: Iterable[int], preprocessing: Preprocessing) -> list[int]:
        """Fill some rows; return those whose pictures must be read again."""
        waiting, faults = [], {}
        for row in rows:
            index = int(self.chosen[row])
            try:
                if (example := self._read(index)) is None:
                    waiting.append(row)
                else:
                    images[row] = preprocessing.prepare(example)
            except Exception as error:  # Pillow's decoders raise errors of every kind
                reason = str(error) or type(error).__name__
                faults[index] = f"{self._catalogue.describe(index)}: {self._about}{reason}"
        if faults:
            listed = few([*faults.values()], between="\n  - ")
            raise DataError(
                f"{self._whose}: {len(faults)} of {self._of} cannot be used:\n  - {listed}\n"
                "Repair them, save them as PNG with 8 bits a channel, or take them out; images are "
                "never skipped.",
                told=f"{self._catalogue.count(faults)} cannot be used",
            )
        return waiting

    def _read(self, index: int) -> Image.Image | bytes | None:
        """Read an example, upright and of 8 bits; None: the range of its pixels is not known."""
        self._about = ""
        example = self._catalogue.open(index)
        if self._catalogue.modality is Modality.TEXTS:
            return example
        opened = open_content(example) if isinstance(example, bytes) else example
        self._about = f"{opened.format or 'pixels'}, mode {opened.mode}, size {opened.size}: "
        kind = _kind(opened)
        wide = kind in WIDE.values()
        white = getattr(opened, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0
        odd = {
            PAGES: getattr(opened, "is_animated", False),
            TURNED: opened.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9),
            NEGATIVE: wide and white,
            kind: bool(kind),
        }
        upright = ImageOps.exif_transpose(opened)
        odd[SEE_THROUGH] = not wide and _see_through(upright)
        for what in (what for what, is_so in odd.items() if is_so):
            self._odd[what].add(index)
        if kind and kind not in self._tops:
            self._peaks[kind] = max(_peak(upright, kind), self._peaks.get(kind, 0))
        if not wide:
            return upright
        if kind not in self._tops:
            return None
        pixels = np.rint(np.asarray(upright) / (self._tops[kind] / 255))
        return Image.fromarray(pixels.clip(max=255).astype(np.uint8))


def picture_of(content: bytes) -> Image.Image:
    """Read one picture by itself, upright; may raise any exception.

    Raises:
        ValueError: If its pixels have more than 8 bits: one picture does not tell their range.
    """
    opened = open_content(content)
    if (kind := _kind(opened)) in WIDE.values():
        raise ValueError(f"it has {kind}, whose range is not known; save it as PNG with 8 bits")
    return ImageOps.exif_transpose(opened)


def open_content(content: bytes) -> Image.Image:
    """Open a picture's file; most formats read the header alone."""
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        what = next(what for at, start, what in FOREIGN if content.startswith(start, at))
        raise ValueError(what if content else "it is empty (0 bytes)") from None


def _kind(opened: Image.Image) -> str:
    """Name the kind of pixels with more than 8 bits; empty: they have 8 or fewer."""
    mode = "I;16" if opened.mode.startswith("I;16") else opened.mode
    layout = str([tile[3] for tile in getattr(opened, "tile", ())[:1]])  # such as "RGB;16B"
    return WIDE.get(mode, COLOURS if ";16" in layout else "")


def _see_through(picture: Image.Image) -> bool:
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")
    has_alpha = picture.mode in ("LA", "PA", "RGBA")
    return has_alpha and bool(np.asarray(picture.getchannel("A")).min() < 255)


def _peak(picture: Image.Image, kind: str) -> float:
    """Return the largest pixel; raise ``ValueError`` on pixels that cannot be scaled."""
    pixels = np.asarray(picture.convert("RGB") if kind == COLOURS else picture)
    low, high = float(pixels.min()), float(pixels.max())
    if not 0 <= low <= high < 2 ** BITS[-1]:  # neither if a pixel is no number
        raise ValueError(f"its pixels span {low:g}..{high:g}, expected 0 to at most 65535")
    return high


def _top(kind: str, peak: float, which: str) -> int:
    """Return the value that becomes 255, given the largest one of all pictures."""
    if kind == COLOURS and peak < 64:
        which = (
            f"{which} of at most 14 bits: of 16, Pillow reads the upper 8, and most would be lost"
        )
        raise DataError(f"{which}. Save them with 8 bits a channel.")
    if kind == WIDE["F"] and 1 < peak < 16:
        raise DataError(f"{which} up to {peak:g}, neither 0..1 nor 0..255. Save them with 8 bits.")
    if kind == WIDE["F"] and peak <= 1:
        return 1
    bits = BITS[-1] if kind == COLOURS else next(b for b in BITS if peak < 2**b)
    return int(2**bits - 1)
