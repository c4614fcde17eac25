"""Folders of models as timm writes them, and a hub that holds one without a network."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from torch import nn

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


def write_folder(folder: Path) -> Path:
    """A model unlike any of timm's own, written by timm."""
    torch.manual_seed(0)
    model = timm.create_model(TINY, num_classes=3, **ARGS)
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
