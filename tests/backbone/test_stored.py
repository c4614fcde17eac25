"""The pre-trained weights as one file: nothing else is needed to compose or to run."""

from __future__ import annotations

import json

import pytest
import torch
from builders import altered, normal
from registry_builders import WIDTH, backbone, same_bits

from fedcompo.backbone.stored import StoredBackbone, save_backbone
from fedcompo.errors import BackboneError, FileFormatError
from fedcompo.storage.manifest import OWN
from fedcompo.storage.tensorfile import load, save


@pytest.fixture
def path(tmp_path):
    save_backbone(tmp_path / "backbone.safetensors", backbone())
    return tmp_path / "backbone.safetensors"


def claiming(path, **claims):
    """The same weights with other claims about them, sealed."""
    tensors, manifest = load(path)
    manifest = {k: v for k, v in manifest.items() if k not in OWN} | claims
    save(path, {name: tensor.clone() for name, tensor in tensors.items()}, manifest)
    return path


def test_what_was_stored_is_the_same_backbone(path):
    given, found = backbone(), StoredBackbone(path).load()
    for part in ("name", "fingerprint", "preprocessing", "architecture", "classifier"):
        assert getattr(found, part) == getattr(given, part)
    assert found.num_features == WIDTH
    assert same_bits(found.model.state_dict(), given.model.state_dict())
    assert same_bits(dict(found.theta_0), dict(given.theta_0))
    images = normal(3, 1, 8, 8, seed=0, dtype=torch.float32)
    assert torch.equal(found.model(images), given.model(images))
    assert not found.model.training
    assert not any(p.requires_grad for p in found.model.parameters())


def test_all_but_the_weights_is_known_before_one_is_read(path):
    def refuse(wrong: str) -> None:
        raise AssertionError("a weight was read")

    stored = StoredBackbone(path, guard=refuse)
    assert stored.fingerprint == backbone().fingerprint
    assert stored.target_weights == tuple(sorted(backbone().theta_0))
    shapes = stored.theta_shapes
    assert {n: t.shape for n, t in shapes.items()} == {
        n: t.shape for n, t in backbone().theta_0.items()
    }
    assert all(t.device.type == "meta" for t in shapes.values())
    with pytest.raises(AssertionError):
        stored.load()


def test_the_same_backbone_is_stored_in_the_same_bytes(path, tmp_path):
    save_backbone(tmp_path / "again", backbone())
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_an_altered_weight_is_found_on_loading(path):
    altered(path, path.stat().st_size - 1)
    with pytest.raises(FileFormatError, match="was altered"):
        StoredBackbone(path).load()


def test_another_file_is_refused(path, tmp_path):
    save(tmp_path / "other", {}, {"content": "fisher"})
    with pytest.raises(FileFormatError, match="holds a 'fisher', expected a 'backbone'"):
        StoredBackbone(tmp_path / "other")


@pytest.mark.parametrize(
    "claims",
    [
        {"architecture": "no_such_model"},
        {"model_args": {**json.loads(json.dumps(backbone().model_args)), "depth": 3}},
        {"model_args": {"no_such_argument": 1}},
    ],
    ids=["architecture", "size", "argument"],
)
def test_a_model_that_timm_cannot_build_is_an_error_that_says_what_to_do(claims, path):
    with pytest.raises(BackboneError, match="Use the timm version that the weights were stored"):
        StoredBackbone(claiming(path, **claims)).load()


@pytest.mark.parametrize("entry", ["fingerprint", "target_weights", "model_args"])
def test_a_backbone_that_does_not_say_all_is_refused(entry, path):
    tensors, manifest = load(path)
    del manifest[entry]
    save(path, {name: tensor.clone() for name, tensor in tensors.items()}, manifest)
    with pytest.raises(FileFormatError, match=entry):
        StoredBackbone(path)
