"""A model of any backbone: the code in its card, run as printed, gives the registry's logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from builders import contribution, random_head, random_statistics
from timm_folders import ARGS, TINY, logits_as_printed, offline, write_folder

from fedcompo.backbone.backbone import EMBEDDED, Backbone, load_backbone
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Kind, Statistics
from fedcompo.config.run import BackboneConfig
from fedcompo.export.folder import publish
from fedcompo.export.selection import from_folders, from_registry
from fedcompo.registry.registry import Registry
from fedcompo.storage.files import BACKBONE, CONFIG, WEIGHTS


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


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda *_: load_backbone(BackboneConfig()), Kind.LORA),
        (lambda *_: load_backbone(BackboneConfig(image_size=42, channels=3)), Kind.LORA),
        (of_texts, Kind.LORA),
        (of_a_checkpoint, Kind.TANGENT),
        (of_a_folder, Kind.FULL),
        (of_the_hub, Kind.FULL),
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
        settings={
            "backbone": backbone.name,
            "image-size": backbone.preprocessing.shape[2],
            "channels": backbone.preprocessing.channels,
            "statistics": "sums",
        },
    )
    registry = Registry.create(tmp_path / "registry", backbone, CompositionSettings())
    registry.add(member)
    publish(tmp_path / "out", from_registry(registry))
    logits, images = logits_as_printed(tmp_path / "out", backbone.preprocessing, monkeypatch)
    with torch.no_grad():
        expected = registry.model()(backbone.preprocessing.normalise(images))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    if backbone.name == EMBEDDED:
        return
    # Without the registry, from the contribution's folder and the pre-trained weights, the same.
    member.save(tmp_path / "ada")
    with from_folders([tmp_path / "ada"], checkpoint=str(registry.path / BACKBONE)) as selection:
        publish(tmp_path / "again", selection)
    again, out = tmp_path / "again", tmp_path / "out"
    assert (again / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()
    configs = [json.loads((folder / CONFIG).read_text()) for folder in (again, out)]
    assert configs[0]["pretrained_cfg"] == configs[1]["pretrained_cfg"]
