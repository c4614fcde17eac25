"""A backbone from a folder that timm wrote: what is made of it does not need the folder."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from builders import altered, contribution, pixels, random_head, random_statistics
from cli_runs import told
from timm_folders import TINY, offline, write_folder
from torch.func import functional_call

from fedcompo.backbone.backbone import Backbone, load_backbone
from fedcompo.backbone.stored import StoredBackbone, save_backbone
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Statistics
from fedcompo.config.run import BackboneConfig
from fedcompo.errors import BackboneError, FileFormatError
from fedcompo.method.contribution import Contribution
from fedcompo.registry.registry import Registry
from fedcompo.storage.files import MODEL_CARD
from fedcompo.storage.manifest import OWN
from fedcompo.storage.tensorfile import load, save

IMAGES = pixels(3, 1, 8)
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "site.v1@home" / "my.model")


def loaded(name: str, **config) -> Backbone:
    return load_backbone(BackboneConfig(backbone=name, **config))


def features_of_timm(name: str, **arguments):
    model = timm.create_model(name, pretrained=True, num_classes=0, **arguments).eval()
    with torch.no_grad():
        return model((IMAGES.float() / 255 - 0.5) / 0.5)


def member(backbone: Backbone, client: str, *classes: str) -> Contribution:
    seed = sum(client.encode())
    made = contribution(
        client,
        theta_0=backbone.theta_0,
        base=backbone.fingerprint,
        classes=classes,
        scale=0.1,
        seed=seed,
    )
    width = backbone.num_features
    return replace(
        made,
        head=random_head(classes, width, seed=len(client)),
        statistics=random_statistics(Statistics.SUMS, classes, width, seed=1, num_examples=20),
        fisher=None,
    )


def check_rebuilt(backbone: Backbone, expected) -> None:
    """The plain architecture and its arguments make the same model."""
    assert backbone.architecture == TINY
    assert "num_classes" not in backbone.model_args
    model = timm.create_model(backbone.architecture, num_classes=0, **backbone.model_args)
    model.load_state_dict(backbone.model.state_dict())
    with torch.no_grad():
        found = model.eval()(backbone.preprocessing.normalise(IMAGES))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(backbone.forward({})(IMAGES), expected)


def test_a_local_folder_is_known_by_its_architecture_and_weights_not_by_its_path(folder):
    backbone = loaded(f"local-dir:{folder}")
    check_rebuilt(backbone, features_of_timm(f"local-dir:{folder}"))
    assert re.fullmatch(rf"local-dir:{TINY}@[0-9a-f]+", backbone.fingerprint)
    folder.rename(folder.with_name("moved"))
    assert loaded(f"local-dir:{folder.with_name('moved')}").fingerprint == backbone.fingerprint


def test_a_repository_of_the_hub_is_read_from_its_cache(folder, tmp_path, monkeypatch):
    offline(tmp_path, monkeypatch, folder)
    backbone = loaded("hf-hub:org/my.model@main")
    check_rebuilt(backbone, features_of_timm(f"local-dir:{folder}"))
    assert backbone.fingerprint.startswith("hf-hub:org/my.model@main@")


def test_the_input_can_be_changed_and_the_weights_can_come_from_a_checkpoint(folder):
    name, wanted = f"local-dir:{folder}", {"image_size": 16, "channels": 3}
    backbone = loaded(name, **wanted)
    assert (backbone.model_args["img_size"], backbone.model_args["in_chans"]) == (16, 3)
    expected = timm.create_model(name, pretrained=True, num_classes=0, img_size=16, in_chans=3)
    rebuilt = timm.create_model(backbone.architecture, num_classes=0, **backbone.model_args)
    rebuilt.load_state_dict(expected.state_dict())
    save_backbone(folder.parent / "backbone.safetensors", loaded(name))
    stored = str(folder.parent / "backbone.safetensors")
    assert loaded("local-dir:gone", **wanted, checkpoint=stored).fingerprint == backbone.fingerprint
    (folder / WEIGHTS).rename(folder.parent / WEIGHTS)
    same = loaded(name, **wanted, checkpoint=str(folder.parent / WEIGHTS))
    assert same.fingerprint == backbone.fingerprint
    (folder / CONFIG).rename(folder.parent / CONFIG)
    folder.rmdir()
    same = loaded(name, **wanted, checkpoint=str(folder.parent / WEIGHTS))
    assert same.fingerprint == backbone.fingerprint


def test_a_registrys_file_is_a_checkpoint_of_its_architecture_alone(tmp_path):
    made = write_folder(tmp_path / "rgb", in_chans=3)
    backbone, path = loaded(f"local-dir:{made}"), tmp_path / "backbone.safetensors"
    save_backbone(path, backbone)
    same = loaded("local-dir:gone", checkpoint=str(path))
    assert (same.fingerprint, same.preprocessing) == (backbone.fingerprint, backbone.preprocessing)
    assert loaded(TINY, checkpoint=str(path)).name == TINY
    grey = loaded("local-dir:gone", checkpoint=str(path), channels=1)
    assert grey.fingerprint == loaded(f"local-dir:{made}", channels=1).fingerprint
    with pytest.raises(BackboneError, match=f"holds the weights of '{TINY}', but .*'vit_base"):
        loaded("vit_base_patch16_224", checkpoint=str(path))
    altered(path, -1)
    with pytest.raises(FileFormatError, match="altered"):
        loaded("local-dir:gone", checkpoint=str(path))


def test_a_registry_needs_the_folder_no_more(folder, tmp_path):
    backbone = loaded(f"local-dir:{folder}")
    registry = Registry.create(tmp_path / "registry", backbone, CompositionSettings())
    registry.add(member(backbone, "ada", "cat", "dog"), member(backbone, "bea", "owl", "yak"))
    shutil.rmtree(folder)
    registry = Registry(tmp_path / "registry")
    registry.remove("bea")
    told("export", "-r", registry.path, "-o", tmp_path / "out")
    oracle = {**backbone.model.state_dict(), **registry.theta_p()}
    with torch.no_grad():
        batch = backbone.preprocessing.normalise(IMAGES)
        expected = registry.joint_head()(functional_call(backbone.model, oracle, (batch,)))
        for place in (registry.path / "model", tmp_path / "out"):
            model = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
            torch.testing.assert_close(model(batch), expected)
        torch.testing.assert_close(registry.model()(batch), expected)
    card = (tmp_path / "out" / MODEL_CARD).read_text(encoding="utf-8")
    assert "my.model" not in card and "site.v1" not in card


def test_a_file_that_names_a_folder_in_place_of_the_architecture_is_read_while_it_is_there(
    folder, tmp_path
):
    backbone, path = loaded(f"local-dir:{folder}"), tmp_path / "backbone.safetensors"
    save_backbone(path, backbone)
    tensors, manifest = load(path)
    manifest = {key: value for key, value in manifest.items() if key not in OWN}
    named = {"architecture": "local-dir:/a", "name": f"local-dir:{folder}", "model_args": {}}
    save(path, {k: v.clone() for k, v in tensors.items()}, {**manifest, **named})
    check_rebuilt(StoredBackbone(path).load(), backbone.forward({})(IMAGES))
    shutil.rmtree(folder)
    with pytest.raises(BackboneError, match="Name a folder that"):
        StoredBackbone(path).load()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"No such file|not found.*Name a folder that `timm.models.save_for_hf` wrote"),
        ("{", "JSONDecodeError"),
        ('{"architecture": "no_such_model"}', "'no_such_model', which this timm"),
    ],
)
def test_a_folder_that_timm_did_not_write_is_refused(config, message, tmp_path):
    if config:
        (tmp_path / CONFIG).write_text(config)
    with pytest.raises(BackboneError, match=message):
        loaded(f"local-dir:{tmp_path}")


def test_a_repository_out_of_reach_is_refused_and_the_way_out_is_named(tmp_path, monkeypatch):
    offline(tmp_path, monkeypatch)
    with pytest.raises(BackboneError, match=r"hf-hub:org/other.*`backbone = local-dir:<their fol"):
        loaded("hf-hub:org/other")


def test_a_folder_that_names_no_classifier_has_timms_usual_one(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    del config["pretrained_cfg"]["classifier"]
    (folder / CONFIG).write_text(json.dumps(config))
    assert loaded(f"local-dir:{folder}").classifier == "head"
