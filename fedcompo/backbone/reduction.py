"""Let large JPEGs be decoded at a half, a quarter or an eighth of their size.

The decoder then computes the lowest frequencies of each block alone, which takes a fraction of the
time. What is left is still so much larger than the input that the resize decides how it looks.

Measured on pictures of 4032 x 3024 (mosaics of sharp photographs, enlarged ones with the noise of a
sensor, discs of all sizes), against decoding them whole, in levels of 0..255, bilinear and bicubic:

    reduction left to the resize   mean difference   largest   levels off by more than 1
    1.5                            0.5 to 1.7         23        5 to 45 %
    3                              0.2 to 0.53         6        0.1 to 8 %
    6                              0.1 to 0.25         5        0 to 0.9 %
    12                             0.05 to 0.13        3        0 to 0.9 %

At hard edges between full colours, which photographs hardly have, single levels are off by 11.
"""

from __future__ import annotations

from PIL import Image

MARGIN = 3
"""Least reduction that is left to the resize."""
LEAST_PIXELS = 2**21
"""Pictures of fewer pixels are decoded whole, in some 20 ms."""
SCALES = (8, 4, 2)


def reduce(picture: Image.Image, side: float) -> None:
    """Choose the scale that a picture, not read yet, will be decoded at.

    Both sides must be multiples of the scale, so that the picture keeps its exact frame. Other
    formats than JPEG, and pictures whose size does not suit, stay as they are.

    Args:
        picture: Just opened; its size is smaller afterwards.
        side: The longer side of what the picture is resized to, in pixels. The shorter side of the
            picture is compared with it: so it may be turned, cropped or squashed afterwards.
    """
    width, height = picture.size
    if width * height < LEAST_PIXELS or picture.format not in ("JPEG", "MPO"):
        return
    for scale in SCALES:
        if not (width % scale or height % scale) and min(picture.size) >= MARGIN * side * scale:
            picture.draft(None, (width // scale, height // scale))
            return
