"""Pictures of printed glyphs, with which the embedded backbone is trained.

The glyphs are letters and symbols of several scripts, rendered from the fonts that ship with
matplotlib. No digit is among them in any form (plain, superscript, circled, of another script).
Letters whose picture agrees with that of a digit 0-9 are left out too, so that the handwritten
digits of the default scenario are new to the backbone. Letters that resemble a digit less than
that, such as ``S`` and ``l``, stay.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CANVAS = 56  # pixels of a rendered glyph, twice the size of the model's input
IMAGE = 28
SCRIPTS = (
    "LATIN GREEK CYRILLIC ARMENIAN GEORGIAN HEBREW ARABIC CANADIAN LISU LAO OLD TIFINAGH NKO OGHAM "
    "COPTIC CHEROKEE RUNIC"
).split()
SYMBOLS = (range(0x100), range(0x20A0, 0x20C0), range(0x2200, 0x2300))  # Latin-1, currency, maths
DIGITS = "0123456789"
FONTS = ("DejaVu", "STIXGeneral", "cmr10", "cmss10", "cmtt10", "cmb10", "cmti10")


@dataclass(frozen=True)
class Glyphs:
    """Rendered glyphs: ``images`` (count, CANVAS, CANVAS) uint8, ``classes`` (count,) int64."""

    images: Tensor
    classes: Tensor
    names: tuple[str, ...]


def is_wanted(code: int) -> bool:
    """Return whether a code point is a plain letter or symbol, and no digit in any form.

    Latin's tone letters are left out too: they were drawn after the digits 2, 5 and 6.
    """
    character = chr(code)
    category = unicodedata.category(character)
    words = unicodedata.name(character, "").split()
    if category[0] not in "LSP" or not words:
        return False
    folded = unicodedata.normalize("NFKD", character)
    if any(unicodedata.category(c)[0] == "N" for c in folded) or {"DIGIT", "TONE"} & set(words):
        return False
    if category[0] == "L":
        return folded == character and words[0] in SCRIPTS
    return any(code in block for block in SYMBOLS)


def render(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
    """Draw one character, cropped and centred; its longer side fills 44 of 56 pixels."""
    sheet = Image.new("L", (160, 160))
    ImageDraw.Draw(sheet).text((48, 32), character, fill=255, font=font)
    box = sheet.getbbox()
    if box is None:
        return None
    glyph = sheet.crop(box)
    if min(glyph.size) < 2 or max(glyph.size) < 16:  # dots and commas lose their size when cropped
        return None
    scale = 44 / max(glyph.size)
    size = (max(2, round(glyph.width * scale)), max(2, round(glyph.height * scale)))
    canvas = Image.new("L", (CANVAS, CANVAS))
    canvas.paste(
        glyph.resize(size, Image.Resampling.BILINEAR),
        ((CANVAS - size[0]) // 2, (CANVAS - size[1]) // 2),
    )
    return np.asarray(canvas)


def load_glyphs(min_fonts: int = 4) -> Glyphs:
    """Render every wanted character in every font that has it; look-alikes become one class."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    rendered: dict[str, list[np.ndarray]] = {}
    for path in sorted(folder.glob("*.ttf")):
        if not path.name.startswith(FONTS) or "Display" in path.name:
            continue
        font = ImageFont.truetype(str(path), 64)
        for code in sorted(FT2Font(str(path)).get_charmap()):
            wanted = is_wanted(code) or chr(code) in DIGITS
            if wanted and not (path.name.startswith("cm") and code > 126):
                image = render(font, chr(code))
                if image is not None:
                    rendered.setdefault(chr(code), []).append(image)
    rendered = {c: images for c, images in rendered.items() if len(images) >= min_fonts}
    return merge_look_alikes(rendered)


def merge_look_alikes(rendered: dict[str, list[np.ndarray]], threshold: float = 0.96) -> Glyphs:
    """Merge characters whose pictures agree (Latin A, Greek Alpha, Cyrillic A) into one class.

    Digits are rendered only for this comparison: they are dropped, with all that agrees with one.
    """
    names = sorted(rendered)
    first = np.stack([np.mean(rendered[name], axis=0).ravel() for name in names])
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    alike = first @ first.T > threshold
    owner = list(range(len(names)))
    for i in range(len(names)):
        for j in np.flatnonzero(alike[i, :i]):
            owner[i] = min(owner[i], owner[j])
    digits = {owner[names.index(digit)] for digit in DIGITS}
    kept = sorted(set(owner) - digits)
    images, classes = [], []
    for i, name in enumerate(names):
        if owner[i] in digits:
            continue
        images.extend(rendered[name])
        classes.extend([kept.index(owner[i])] * len(rendered[name]))
    return Glyphs(
        torch.from_numpy(np.stack(images)),
        torch.tensor(classes),
        tuple(names[i] for i in kept),
    )


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Distort printed glyphs so that they look handwritten and badly scanned.

    Args:
        images: (batch, CANVAS, CANVAS) uint8.
        generator: Source of every random choice.

    Returns:
        (batch, 1, IMAGE, IMAGE) in [0, 1]: stroke width, affine and elastic distortion, resolution,
        contrast and noise all drawn at random.
    """
    batch = len(images)
    device = images.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator).to(device)

    x = images.float().unsqueeze(1) / 255
    parts = list(x.chunk(4))  # stroke width: as printed, bolder, much bolder, thinner
    for i, width in ((1, 3), (2, 5)):
        if i < len(parts):
            parts[i] = F.max_pool2d(parts[i], width, 1, width // 2)
    if len(parts) == 4:
        parts[3] = -F.max_pool2d(-parts[3], 3, 1, 1)
    x = torch.cat(parts)

    angle = uniform(-0.35, 0.35, batch)
    shear = uniform(-0.4, 0.4, batch)
    scale_x, scale_y = uniform(0.8, 1.7, batch), uniform(0.8, 1.25, batch)
    cos, sin = angle.cos(), angle.sin()
    affine = torch.stack(
        [
            torch.stack([cos * scale_x, (shear * cos - sin) * scale_y], 1),
            torch.stack([sin * scale_x, (shear * sin + cos) * scale_y], 1),
        ],
        1,
    )
    affine = torch.cat([affine, uniform(-0.12, 0.12, batch, 2, 1)], 2)
    grid = F.affine_grid(affine, [batch, 1, IMAGE, IMAGE], align_corners=False)
    field = torch.randn(batch, 2, 4, 4, generator=generator).to(device)
    field = F.interpolate(field, IMAGE, mode="bicubic", align_corners=True)
    strength = uniform(0.0, 0.13, batch, 1, 1, 1)
    grid = grid + strength * field.permute(0, 2, 3, 1)
    x = F.grid_sample(x, grid, align_corners=False)

    shuffle = torch.randperm(batch, generator=generator).to(device)
    x = x[shuffle]
    parts = []
    for part, side in zip(x.chunk(6), (8, 8, 10, 14, 20, 28), strict=False):
        if side < IMAGE:
            part = F.interpolate(part, side, mode="area")
            part = F.interpolate(part, IMAGE, mode="bilinear", align_corners=False)
        parts.append(part)
    x = torch.cat(parts)[shuffle.argsort()]
    x = x * uniform(0.7, 1.5, batch, 1, 1, 1)
    noise = torch.randn(x.shape, generator=generator).to(device)
    return (x + uniform(0.0, 0.12, batch, 1, 1, 1) * noise).clamp(0, 1)
