"""Enlarge a very thin picture only where it is cropped; the bits are those of enlarging it whole.

timm fits the shorter side to the model's input and crops the centre. A picture of 1 × 3,000 pixels
becomes one of 224 × 672,000 on the way, 600 MB, of which 224 × 224 are kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
RATIO = 16
"""A picture is thin if its sides differ by more than this factor."""
BITS = 22
"""Pillow's weights of pixels are fixed-point numbers with so many bits after the point."""


def bilinear(x: Floats) -> Floats:
    """Weight of a pixel at a distance x, in pixels; 0 from 1 on."""
    return np.where(x < 1, 1 - x, 0)


def bicubic(x: Floats) -> Floats:
    """Weight of a pixel at a distance x; 0 from 2 on."""
    near = (1.5 * x - 2.5) * x * x + 1
    return np.where(x < 1, near, np.where(x < 2, (((x - 5) * x + 8) * x - 4) * -0.5, 0))


FILTERS = {Image.Resampling.BILINEAR: (bilinear, 1), Image.Resampling.BICUBIC: (bicubic, 2)}
"""Weight and reach of the filters that are computed here; others enlarge a picture whole."""


class Thin(Image.Image):
    """Stands for a thin picture: ``resize`` remembers the size, ``crop`` computes the pixels.

    Only what timm's transform asks of a picture is there.
    """

    def __init__(self, picture: Image.Image, size: tuple[int, int] = (0, 0), by: Any = None):
        """Stand for a picture of mode L or RGB, enlarged to (width, height) by a filter."""
        super().__init__()
        self.picture, self.wanted, self.by = picture, size if any(size) else picture.size, by

    @property
    def size(self) -> tuple[int, int]:
        """Width and height after enlarging."""
        return self.wanted

    def getbands(self) -> tuple[str, ...]:
        """Names of the channels."""
        return self.picture.getbands()

    def resize(self, size: Any, resample: Any = None, *_: Any, **__: Any) -> Image.Image:
        """Remember size and filter; a picture that becomes smaller is resized at once."""
        if resample not in FILTERS or any(a < b for a, b in zip(size, self.size, strict=True)):
            return self.picture.resize(size, resample)
        return Thin(self.picture, size, resample)

    def crop(self, box: Any = None) -> Image.Image:
        """Compute the pixels in (left, top, right, bottom) of the enlarged picture."""
        if self.size == self.picture.size:
            return self.picture.crop(box)
        left, top, right, bottom = box
        columns, across = _taps(self.picture.width, self.size[0], left, right, self.by)
        rows, down = _taps(self.picture.height, self.size[1], top, bottom, self.by)
        corner = int(columns.min()), int(rows.min())
        part = self.picture.crop((*corner, int(columns.max()) + 1, int(rows.max()) + 1))
        pixels = np.asarray(part, np.int64).swapaxes(0, 1)  # (columns, rows[, channels])
        # Pillow, too, goes along the rows first, where no side becomes shorter.
        wide = _weighted(pixels, columns - corner[0], across).swapaxes(0, 1)
        return Image.fromarray(_weighted(wide, rows - corner[1], down).astype(np.uint8))


def _taps(length: int, size: int, first: int, last: int, by: Any) -> tuple[Integers, Integers]:
    """Places along one side, and their weights, for pixels first..last − 1 of ``size``.

    As Pillow's ``precompute_coeffs``, operation by operation. Both are (taps, last − first).
    """
    weight, reach = FILTERS[by]
    centres = (np.arange(first, last) + 0.5) * (length / size)
    low = np.maximum((centres - reach + 0.5).astype(int), 0)
    high = np.minimum((centres + reach + 0.5).astype(int), length)
    places = low + np.arange((high - low).max())[:, None]
    weights = weight(np.abs(places - centres + 0.5)) * (places < high)
    weights /= weights.sum(0)
    fixed = np.trunc(weights * 2**BITS + np.copysign(0.5, weights)).astype(int)
    return np.minimum(places, length - 1), fixed


def _weighted(pixels: Integers, places: Integers, weights: Integers) -> Integers:
    """Sum pixels at places along the first axis, and round to 0..255."""
    shape = (-1, *[1] * (pixels.ndim - 1))
    total = sum(w.reshape(shape) * pixels[p] for p, w in zip(places, weights, strict=True))
    rounded: Integers = (total + (1 << BITS - 1)) >> BITS
    return rounded.clip(0, 255)
