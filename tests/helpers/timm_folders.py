"""Folders of models as timm writes them, and a hub that holds one without a network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.storage.files import MODEL_CARD

TINY = "vit_tiny_patch16_224"
ARGS = {
    "img_size": 8,
    "in_chans": 1,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "class_token": False,
    "global_pool": "avg",
}


def write_folder(folder: Path, **arguments: Any) -> Path:
    """A model unlike any of timm's own, written by timm."""
    torch.manual_seed(0)
    model = timm.create_model(TINY, num_classes=3, **{**ARGS, **arguments})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


def offline(cache: Path, monkeypatch: pytest.MonkeyPatch, folder: Path | None = None) -> None:
    """No network, and a cache of the hub that holds nothing but ``org/my.model``, if given."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    if folder:
        home = cache / "models--org--my.model"
        (home / "refs").mkdir(parents=True)
        (home / "refs" / "main").write_text("abc")
        shutil.copytree(folder, home / "snapshots" / "abc")


def logits_as_printed(
    folder: Path, seen: Preprocessing, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """Run the code of a folder's card in it; return the logits, and the example as uint8."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "picture.png")
    card = (folder / MODEL_CARD).read_text(encoding="utf-8")
    assert card.count("```python\n") == 1
    monkeypatch.chdir(folder)
    scope: dict[str, Any] = {}
    exec(card.partition("```python\n")[2].partition("```")[0], scope)
    example = scope["text"].encode() if "text" in scope else Image.open(folder / "picture.png")
    return scope["logits"].detach(), seen.prepare(example)[None]
