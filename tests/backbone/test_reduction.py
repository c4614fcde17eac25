"""Large JPEGs that are decoded at a smaller scale look as if they were decoded whole."""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.backbone.reduction import MARGIN, reduce
from fedcompo.data.pictures import picture_of

WIDE, HIGH = 2048, 1536


def seen(size: Any = 64, **changes: Any) -> Preprocessing:
    return Preprocessing(size, 3, (0.5,) * 3, (0.5,) * 3, **changes)


@functools.cache
def photograph(kind: str = "JPEG", size: tuple[int, int] = (WIDE, HIGH), turn: int = 1) -> bytes:
    """Clouds, hard edges of all sizes, and a sensor's noise."""
    draw = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(HIGH)[:, None], np.fft.rfftfreq(WIDE)[None])
    frequency[0, 0] = 1
    noise = draw.normal(size=(HIGH, WIDE))
    clouds = np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=(HIGH, WIDE))
    shades = 128 + 55 * clouds / clouds.std() + np.array([20, 0, -30])[:, None, None]
    picture = Image.fromarray(shades.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    for _ in range(300):
        x, y, r = draw.integers(0, WIDE), draw.integers(0, HIGH), min(5 / draw.random(), 300)
        colour = tuple(map(int, draw.integers(0, 256, 3)))
        ImageDraw.Draw(picture).ellipse([x - r, y - r, x + r, y + r], fill=colour)
    grain = draw.integers(-6, 7, (HIGH, WIDE, 1))
    pixels = (np.asarray(picture) + grain).clip(0, 255).astype(np.uint8)
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x0112] = turn
    Image.fromarray(pixels).crop((0, 0, *size)).save(content, kind, quality=92, exif=exif)
    return content.getvalue()


def whole(content: bytes, preprocessing: Preprocessing) -> Tensor:
    return preprocessing.resize(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))


def reduced_size(content: bytes, preprocessing: Preprocessing) -> tuple[int, int]:
    picture = Image.open(io.BytesIO(content))
    preprocessing.reduce(picture)
    picture.load()
    return picture.size


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 8),
        ({"size": 128}, 4),
        ({"size": 224}, 2),
        ({"size": 224, "crop_fraction": 0.9}, 2),
        ({"size": 64, "crop_mode": "squash"}, 8),
        ({"size": (32, 64)}, 8),
    ],
)
def test_at_the_margin_the_picture_differs_by_half_a_level(
    interpolation: str, changes: dict[str, Any], scale: int
):
    preprocessing = seen(**changes, interpolation=interpolation)
    assert reduced_size(photograph(), preprocessing) == (WIDE // scale, HIGH // scale)
    apart = (
        picture_of(photograph(), preprocessing).int() - whole(photograph(), preprocessing).int()
    ).abs()
    assert apart.float().mean() <= 0.55
    assert apart.max() <= 12  # at edges of full colours; JPEG has half as many pixels of colour


def test_grey_and_turned_pictures_are_reduced_too():
    grey = Preprocessing(64, 1, (0.5,), (0.5,))
    apart = (picture_of(photograph(), grey).int() - whole(photograph(), grey).int()).abs()
    assert apart.float().mean() <= 0.55
    turned = photograph(turn=6)
    apart = (picture_of(turned, seen()).int() - whole(turned, seen()).int()).abs()
    assert apart.float().mean() <= 0.55


@pytest.mark.parametrize(
    ("content", "changes"),
    [
        ({"kind": "PNG"}, {}),
        ({"size": (2047, 1535)}, {}),  # a part of a block would shift the frame
        ({"size": (1408, 1408)}, {}),  # two megapixels are decoded in no time
        ({}, {"size": 257}),
        ({}, {"rule": 1}),
    ],
)
def test_other_pictures_keep_their_bits(content: dict[str, Any], changes: dict[str, Any]):
    picture, preprocessing = photograph(**content), seen(**changes)
    assert reduced_size(picture, preprocessing) == content.get("size", (WIDE, HIGH))
    assert torch.equal(picture_of(picture, preprocessing), whole(picture, preprocessing))


def test_the_scale_leaves_the_margin_to_the_resize():
    for side in (1, 63, 64, 65, 128, 129, 256, 257, 1000):
        picture = Image.open(io.BytesIO(photograph()))
        reduce(picture, side)
        left = min(picture.size) / side
        assert picture.size == (WIDE, HIGH) or left >= MARGIN
        assert picture.size == (WIDE // 8, HIGH // 8) or left < 2 * MARGIN
