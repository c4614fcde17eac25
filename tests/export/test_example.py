"""The code in the card of a model: run as printed, it gives the registry's own logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from builders import contribution, random_head, random_statistics
from timm_folders import ARGS, TINY, logits_as_printed, offline, write_folder

from fedcompo.backbone.backbone import Backbone, load_backbone
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Kind, Statistics
from fedcompo.config.run import BackboneConfig
from fedcompo.export.folder import publish
from fedcompo.export.selection import from_registry
from fedcompo.registry.registry import Registry


def of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """A file without a folder, at another size and number of channels."""
    args = {key: value for key, value in ARGS.items() if key not in ("img_size", "in_chans")}
    model = timm.create_model(TINY, num_classes=2, img_size=16, **args)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "mine.pth")
    config = {"architecture": TINY, "pretrained_cfg": {"crop_pct": 0.8}, "model_args": args}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return load_backbone(
        BackboneConfig(TINY, str(tmp_path / "mine.pth"), image_size=32, channels=1)
    )


def of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    name, path = "byte_transformer_small", tmp_path / "mine.pth"
    torch.save(timm.create_model(name).state_dict(), path)
    return load_backbone(BackboneConfig(name, str(path)))


def of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    offline(tmp_path / "cache", monkeypatch, write_folder(tmp_path / "mine"))
    return load_backbone(BackboneConfig("hf-hub:org/my.model"))


def of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    folder = write_folder(tmp_path / "mine")
    return load_backbone(BackboneConfig(f"local-dir:{folder}", image_size=16, channels=3))


@pytest.mark.parametrize("kind", [Kind.FULL, Kind.TANGENT])
@pytest.mark.parametrize(
    "make",
    [
        lambda *_: load_backbone(BackboneConfig()),
        lambda *_: load_backbone(BackboneConfig(image_size=42, channels=3)),
        of_texts,
        of_a_checkpoint,
        of_a_folder,
        of_the_hub,
    ],
    ids=["embedded", "resized", "text", "checkpoint", "local-dir", "hub"],
)
def test_the_code_of_the_card_gives_the_registrys_logits(make, kind, tmp_path, monkeypatch):
    backbone = make(tmp_path, monkeypatch)
    classes, width = ("cat", "dog"), backbone.num_features
    made = contribution(
        "ada", kind, theta_0=backbone.theta_0, base=backbone.fingerprint, classes=classes, scale=0.1
    )
    member = replace(
        made,
        head=random_head(classes, width, seed=1),
        statistics=random_statistics(Statistics.SUMS, classes, width, seed=1, num_examples=20),
        fisher=None,
    )
    registry = Registry.create(tmp_path / "registry", backbone, CompositionSettings())
    registry.add(member)
    publish(tmp_path / "out", from_registry(registry))
    logits, images = logits_as_printed(tmp_path / "out", backbone.preprocessing, monkeypatch)
    with torch.no_grad():
        expected = registry.model()(backbone.preprocessing.normalise(images))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
