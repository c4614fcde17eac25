"""Pixels of the evaluation transform are timm's own, to the bit, for all that timm configures."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache
from itertools import cycle, islice

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from fedcompo.backbone import thin
from fedcompo.backbone.backbone import load_backbone
from fedcompo.backbone.preprocessing import Modality, Preprocessing
from fedcompo.config.run import BackboneConfig
from fedcompo.errors import BackboneError

SIZES = [(260, 150), (97, 211), (3, 2), (33, 64), (1, 1), (1, 19), (301, 7)]
"""Width and height: landscape, portrait, tiny, one pixel, thin."""
INTERPOLATIONS = ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
NAME = "vit_tiny_patch16_224"


@cache
def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def configurations() -> list[dict]:
    """All distinct ways in which pre-trained models of timm see a picture."""
    configs = (
        timm.get_pretrained_cfg(name).to_dict() for name in timm.list_models(pretrained=True)
    )
    resolved = (resolve_data_config(pretrained_cfg=config) for config in configs)
    return list({json.dumps(config, default=str): config for config in resolved}.values())


def assert_same(seen: Preprocessing, config: dict, given: Image.Image) -> None:
    """Compare uint8 and float32 pixels with timm's, bit for bit."""
    pixels = seen.resize(given)
    batch = seen.normalise(torch.stack([pixels, 255 - pixels]))
    assert torch.equal(pixels, create_transform(**config, normalize=False)(given))
    assert torch.equal(batch[0], create_transform(**config)(given)), (config, given.size)


def test_pixels_are_timms_for_every_pretrained_model():
    configs = configurations()
    assert len(configs) > 100
    assert {c["crop_mode"] for c in configs} >= {"center", "squash", "border"}
    assert any(h != w for _, h, w in (c["input_size"] for c in configs))
    sizes = cycle(SIZES[:5])
    for config in configs:
        for size in islice(sizes, 2):
            assert_same(Preprocessing.of_timm(config, {}, Modality.PICTURES), config, picture(*size))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("side", [28, 57, (64, 48), (48, 64)])
def test_pixels_are_timms_for_every_mode_filter_and_proportion(side, mode):
    sides = side if isinstance(side, tuple) else (side, side)
    for interpolation in INTERPOLATIONS:
        for crop in (0.875, 0.95, 1.0, 1.15):
            seen = Preprocessing(
                side, 3, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3), interpolation, crop, crop_mode=mode
            )
            config = {
                "input_size": (3, *sides),
                "mean": seen.mean,
                "std": seen.std,
                "interpolation": interpolation,
                "crop_pct": crop,
                "crop_mode": mode,
            }
            for size in SIZES:
                if mode != "border" or size != (301, 7):
                    assert_same(seen, config, picture(*size))
