"""Open one picture, and tell what is odd about it.

Pictures are turned upright as their EXIF tag says; of several pages or frames the first is read;
transparency is ignored. Pixels of more than 8 bits are scaled by a range that *all* pictures of a
client share, training and test: the smallest of 8, 10, 12, 14 and 16 bits that holds their largest
value (of floating-point numbers, also 0..1). A range for each picture would make dark ones bright.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.data.dicom import ODDITY, dicom_picture
from fedcompo.errors import DataError
from fedcompo.report.pictures import NEGATIVE, PAGES, TURNED, WIDE

BITS = (8, 10, 12, 14, 16)
"""Ranges that cameras and scanners use."""
COLOURS = "16-bit colours"
"""Of them Pillow reads the upper 8 bits."""
FOREIGN = (
    (0, b"version https://git-lfs", "it is a git-lfs pointer; run `git lfs pull`"),
    (0, b"II*\0", "its pixels are of a kind that Pillow cannot read"),  # as all TIFF files start
    (0, b"MM\0*", "its pixels are of a kind that Pillow cannot read"),
    (0, b"PK", "it is a zip archive; unpack it"),
    (0, b"\x1f\x8b", "it is packed by gzip, as NIfTI files are; export its slices"),
    (0, b"%PDF", "it is a PDF; export its pages"),
    (0, b"<", "it is a web page or a drawing (HTML, XML, SVG); fetch or save the picture itself"),
    (4, b"ftyp", "it is a HEIF picture or a video"),
    (0, b"", "Pillow knows no such picture"),
)
"""What a file is that Pillow does not know: where some bytes of it stand, and the bytes."""


def picture_of(content: bytes, preprocessing: Preprocessing) -> Tensor:
    """Read one picture by itself, upright, and resize it; may raise any exception.

    Raises:
        ValueError: If its pixels have more than 8 bits: one picture does not tell their range.
    """
    opened = opened_picture(content)
    if (kind := kind_of(opened)) in WIDE.values():
        raise ValueError(f"it has {kind}, whose range is not known; save it as PNG with 8 bits")
    preprocessing.reduce(opened)
    return preprocessing.resize(ImageOps.exif_transpose(opened))


def opened_picture(content: bytes) -> Image.Image:
    """Open a picture's file; most formats read the header alone."""
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        if content.startswith(b"DICM", 128):
            return dicom_picture(content)
        what = next(what for at, start, what in FOREIGN if content.startswith(start, at))
        raise ValueError(what if content else "it is empty (0 bytes)") from None


def kind_of(opened: Image.Image) -> str:
    """Name the kind of pixels with more than 8 bits; empty: they have 8 or fewer."""
    mode = "I;16" if opened.mode.startswith("I;16") else opened.mode
    layout = str([tile[3] for tile in getattr(opened, "tile", ())[:1]])  # such as "RGB;16B"
    return WIDE.get(mode, COLOURS if ";16" in layout else "")


def oddities(opened: Image.Image, kind: str) -> list[str]:
    """List what is odd about a picture whose pixels are not read yet."""
    white = getattr(opened, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0
    odd = {
        PAGES: getattr(opened, "is_animated", False),
        TURNED: opened.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9),
        NEGATIVE: kind in WIDE.values() and white,
        kind: bool(kind),
        opened.info.get(ODDITY, ""): ODDITY in opened.info,
    }
    return [what for what, is_so in odd.items() if is_so]


def see_through(picture: Image.Image) -> bool:
    """Whether a pixel of a picture is not opaque."""
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")
    has_alpha = picture.mode in ("LA", "PA", "RGBA")
    return has_alpha and bool(np.asarray(picture.getchannel("A")).min() < 255)


def peak_of(picture: Image.Image, kind: str) -> float:
    """Return the largest pixel; raise ``ValueError`` on pixels that cannot be scaled."""
    pixels = np.asarray(picture.convert("RGB") if kind == COLOURS else picture)
    low, high = float(pixels.min()), float(pixels.max())
    if not 0 <= low <= high < 2 ** BITS[-1]:  # neither if a pixel is no number
        raise ValueError(f"its pixels span {low:g}..{high:g}, expected 0 to at most 65535")
    return high


def top_of(kind: str, peak: float, which: str) -> int:
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
