"""The script that made the embedded backbone, as far as it can be checked in seconds."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "fedcompo" / "assets"


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("matplotlib")
    sys.path.append(str(ROOT / "simulations" / "material"))
    return importlib.import_module("glyphs")


def test_the_training_finds_what_it_needs(script):
    training = importlib.import_module("pretrain_glyphs")
    assert training.load_glyphs is script.load_glyphs
    assert training.learning_rate(0, 1000, 1.0, warmup=300) == 1 / 300


def test_no_digit_of_any_script_is_wanted_and_letters_are(script):
    for code in range(0x20000):
        if unicodedata.category(chr(code))[0] == "N":
            assert not script.is_wanted(code), chr(code)
    assert not any(script.is_wanted(ord(c)) for c in "0123456789²½①Ⅷ٣Ƨƽƅ")
    assert all(script.is_wanted(ord(c)) for c in "AzΩжאᐁ+€∑")


def test_what_looks_like_a_digit_goes_and_what_looks_alike_is_one_class(script):
    rng = np.random.default_rng(0)

    def picture():
        return rng.integers(0, 255, (script.CANVAS, script.CANVAS), dtype=np.uint8)

    rendered = {digit: [picture()] for digit in "0123456789"}
    rendered["O"] = rendered["0"] * 2  # agrees with a digit
    rendered["A"] = rendered["Α"] = [picture()] * 3  # Latin and Greek
    rendered["B"] = [picture()]
    glyphs = script.merge_look_alikes(rendered)
    assert glyphs.names == ("A", "B")
    assert glyphs.classes.tolist() == [0, 0, 0, 1, 0, 0, 0]


def test_augmented_glyphs_are_pictures_and_depend_on_the_seed_alone(script):
    images = torch.randint(0, 255, (24, script.CANVAS, script.CANVAS), dtype=torch.uint8)
    views = [script.augment(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert views[0].shape == (24, 1, script.IMAGE, script.IMAGE)
    assert views[0].min() >= 0 and views[0].max() <= 1
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


def test_the_embedded_weights_are_those_the_recipe_names():
    recipe = json.loads((ASSETS / "glyph_vit.json").read_text())
    digest = hashlib.sha256((ASSETS / "glyph_vit.safetensors").read_bytes()).hexdigest()
    assert digest == recipe["sha256"]
    assert recipe["training"]["classes"] >= 400
