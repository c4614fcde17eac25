"""One client as a PEFT adapter, loaded by PEFT itself onto the plain timm model."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from builders import (
    PATTERNS,
    PICO_ARGS,
    altered,
    contribution,
    normal,
    pico_backbone,
    pixels,
    random_head,
)
from timm_folders import logits_as_printed, offline, write_folder
from torch import Tensor, nn
from torch.func import functional_call

from fedcompo.backbone.adapter import ADAPTER, ADAPTER_CONFIG
from fedcompo.backbone.backbone import Backbone, load_backbone, target_weights
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.backbone.stored import StoredBackbone, save_backbone
from fedcompo.composition.settings import CompositionSettings
from fedcompo.config.choices import Kind
from fedcompo.config.run import BackboneConfig
from fedcompo.errors import BackboneError, BackboneMismatch, ContributionError, FileFormatError
from fedcompo.export.peft import export_peft
from fedcompo.export.recipe import MEMBERS
from fedcompo.export.selected import Selection
from fedcompo.method.contribution import Contribution
from fedcompo.method.deltas import LoRA
from fedcompo.method.pool import Pool
from fedcompo.method.task_vector import TaskVector
from fedcompo.storage import tensorfile
from fedcompo.storage.files import BACKBONE, MODEL_CARD

CLASSES = tuple(f"class {i}" for i in range(10))


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="`pip install .[dev]` brings PEFT")


def backbone_of(architecture: str, **model_args: int) -> Backbone:
    """A small model of an architecture, with random weights."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=0, **model_args).eval()
    model = model.requires_grad_(False)
    return Backbone(
        model=model,
        theta_0=target_weights(model, PATTERNS),
        name=architecture,
        fingerprint=f"{architecture}@{tensorfile.tensor_digest(model.state_dict())}",
        preprocessing=Preprocessing(image_size=8, channels=1, mean=(0.5,), std=(0.5,)),
        architecture=architecture,
        classifier="head",
        model_args=model_args,
    )


def deep_backbone() -> Backbone:
    """Twelve blocks: the names of some layers begin as the names of others do."""
    arguments = {key: value for key, value in PICO_ARGS.items() if key != "num_classes"}
    return backbone_of("vit_tiny_patch16_224", **{**arguments, "depth": 12})


BACKBONES = {
    "pico": pico_backbone,
    "deep": deep_backbone,
    "embedded": lambda: load_backbone(BackboneConfig()),
}


def client_of(backbone: Backbone, kind: Kind = Kind.LORA, *, scale: float = 0.1) -> Contribution:
    """A contribution for a backbone; there are more classes than features in the pico models."""
    sent = contribution(
        "hospital-b", kind, theta_0=backbone.theta_0, base=backbone.fingerprint, scale=scale
    )
    head = random_head(CLASSES, backbone.num_features, seed=5)
    return replace(sent, head=replace(head, weight=0.1 * head.weight))


def exported(folder: Path, backbone: Backbone, *clients: Contribution, **given: Any) -> dict:
    """Write the adapter of a selection: of one client as it is, of several with equal shares."""
    with tempfile.TemporaryDirectory() as home:
        save_backbone(Path(home) / BACKBONE, backbone)
        rank = given.pop("rank", None)
        selection = Selection(
            pool=Pool(clients),
            backbone=StoredBackbone(Path(home) / BACKBONE),
            settings=CompositionSettings(scale=1.0),
            head=clients[0].head,
            factor=1 / len(clients),
            made_of=MEMBERS,
        )
        return export_peft(folder, replace(selection, **given), rank=rank)


def with_a_rank_for_each_layer(client: Contribution, backbone: Backbone) -> Contribution:
    """The same client with 1, 2, 3, … columns in its B, layer by layer."""
    tensors = {}
    for rank, (name, weight) in enumerate(sorted(backbone.theta_0.items()), start=1):
        lora = LoRA(weight, rank, torch.Generator().manual_seed(rank))
        tensors[f"{name}/A"] = lora.A.detach()
        tensors[f"{name}/B"] = normal(*lora.B.shape, seed=rank, scale=0.1, dtype=torch.float32)
    return replace(client, task_vector=TaskVector(Kind.LORA, tensors, backbone.fingerprint))


def plain_model(backbone: Backbone, classes: int = len(CLASSES)) -> nn.Module:
    """What a PEFT user has: timm's model with the backbone's weights and some head."""
    model = timm.create_model(backbone.architecture, num_classes=classes, **backbone.model_args)
    left = model.load_state_dict(backbone.model.state_dict(), strict=False)
    assert set(left.missing_keys) == {"head.weight", "head.bias"}
    assert not left.unexpected_keys
    return model.eval()


def logits_in_double_precision(client: Contribution, backbone: Backbone, images: Tensor) -> Tensor:
    """Oracle: θ₀ + BA, the features of that, the client's own rows."""
    theta = {}
    for name, weight in backbone.theta_0.items():
        a, b = (client.task_vector.tensors[f"{name}/{factor}"].double() for factor in "AB")
        theta[name] = weight.double() + b @ a
    model = copy.deepcopy(backbone.model).double()
    features = functional_call(model, theta, (backbone.preprocessing.normalise(images).double(),))
    return features @ client.head.weight.double().T + client.head.bias.double()


def images_for(backbone: Backbone) -> Tensor:
    seen = backbone.preprocessing
    return pixels(4, seen.channels, seen.image_size, seed=3)


@pytest.fixture(params=list(BACKBONES))
def backbone(request) -> Backbone:
    return BACKBONES[request.param]()


@pytest.mark.parametrize("uneven", [False, True], ids=["equal ranks", "uneven ranks"])
def test_pefts_loader_gives_the_clients_own_logits(peft, backbone, uneven, tmp_path):
    client = client_of(backbone)
    client = with_a_rank_for_each_layer(client, backbone) if uneven else client
    exported(tmp_path, backbone, client)
    images = images_for(backbone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of keys that are missing or unknown
        adapted = peft.PeftModel.from_pretrained(plain_model(backbone), tmp_path)
    batch = backbone.preprocessing.normalise(images)
    with torch.no_grad():
        single, double = adapted(batch), adapted.double()(batch.double())
        theta_p = Pool((client,)).compose(backbone.theta_0)
        ours = client.head(backbone.forward(theta_p)(images))
    oracle = logits_in_double_precision(client, backbone, images)
    torch.testing.assert_close(double, oracle, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(single, ours, rtol=0, atol=1e-5)
    frozen = client.head(backbone.forward({})(images))
    assert (ours - frozen).abs().max() > 0.01, "the adapter does not matter in this test"


def test_every_layer_has_its_own_rank_and_is_scaled_by_exactly_one(peft, backbone, tmp_path):
    client = with_a_rank_for_each_layer(client_of(backbone), backbone)
    exported(tmp_path, backbone, client)
    adapted = peft.PeftModel.from_pretrained(plain_model(backbone), tmp_path)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert {f"{name}.weight" for name in layers} == set(backbone.theta_0)
    for name, layer in layers.items():
        assert layer.scaling == {"default": 1.0}
        assert layer.r == {"default": len(client.task_vector.tensors[f"{name}.weight/A"])}


def test_merged_by_peft_it_is_the_composed_model(peft, backbone, tmp_path):
    client = client_of(backbone)
    exported(tmp_path, backbone, client)
    merged = peft.PeftModel.from_pretrained(plain_model(backbone), tmp_path).merge_and_unload()
    theta_p = Pool((client,)).compose(backbone.theta_0)
    expected = {**backbone.model.state_dict(), **theta_p}
    expected |= {"head.weight": client.head.weight, "head.bias": client.head.bias}
    found = merged.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_with_the_adapter_disabled_the_model_is_the_plain_one_with_its_own_head(
    peft, backbone, tmp_path
):
    exported(tmp_path, backbone, client_of(backbone))
    plain = plain_model(backbone)
    batch = backbone.preprocessing.normalise(images_for(backbone))
    with torch.no_grad():
        before = plain(batch)
        adapted = peft.PeftModel.from_pretrained(plain, tmp_path)
        assert not torch.equal(adapted(batch), before)
        with adapted.disable_adapter():
            assert torch.equal(adapted(batch), before)


def of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    return load_backbone(BackboneConfig(f"local-dir:{write_folder(tmp_path / 'mine')}"))


def of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, depth=1)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "mine.pth")
    path = str(tmp_path / "mine.pth")
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 1}})
    )
    return load_backbone(BackboneConfig("vit_tiny_patch16_224", path, image_size=32, channels=1))


def of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    offline(tmp_path / "cache", monkeypatch, write_folder(tmp_path / "mine"))
    return load_backbone(BackboneConfig("hf-hub:org/my.model", image_size=16))


@pytest.mark.parametrize(
    ("make", "hub"),
    [
        (lambda *_: load_backbone(BackboneConfig()), None),
        (lambda *_: load_backbone(BackboneConfig(image_size=42, channels=3)), None),
        (of_a_checkpoint, None),
        (of_a_folder, None),
        (of_the_hub, "org/my.model"),
    ],
    ids=["embedded", "embedded, resized", "checkpoint", "local-dir", "hub"],
)
def test_the_code_of_the_card_makes_the_adapted_model(peft, make, hub, tmp_path, monkeypatch):
    backbone = make(tmp_path, monkeypatch)
    save_backbone(tmp_path / BACKBONE, backbone)  # as the registry holds it
    shutil.rmtree(tmp_path / "mine", ignore_errors=True)
    client = client_of(backbone)
    exported(tmp_path / "adapter", backbone, client)
    card = (tmp_path / "adapter" / MODEL_CARD).read_text(encoding="utf-8")
    front = yaml.safe_load(card.removeprefix("---\n").partition("\n---\n")[0])
    assert (front["library_name"], front.get("base_model")) == ("peft", hub)
    assert front.get("base_model_relation") == ("adapter" if hub else None)
    config = json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())
    assert config["base_model_name_or_path"] == hub
    shutil.copy(tmp_path / BACKBONE, tmp_path / "adapter")
    logits, images = logits_as_printed(tmp_path / "adapter", backbone.preprocessing, monkeypatch)
    oracle = logits_in_double_precision(client, backbone, images)
    torch.testing.assert_close(logits.double(), oracle, rtol=0, atol=1e-5)


def test_the_adapter_says_whose_it_is_and_an_altered_byte_is_found(tmp_path):
    backbone = pico_backbone()
    client = client_of(backbone)
    exported(tmp_path, backbone, client)
    tensors, manifest = tensorfile.load(tmp_path / ADAPTER)
    assert len(tensors) == 2 * len(backbone.theta_0) + 2
    assert manifest["clients"] == ["hospital-b"]
    assert manifest["base"] == backbone.fingerprint
    assert manifest["classes"] == list(CLASSES)
    altered(tmp_path / ADAPTER, -1)
    with pytest.raises(FileFormatError, match="altered"):
        tensorfile.load(tmp_path / ADAPTER)


def test_only_ranks_that_differ_from_the_usual_one_are_listed(tmp_path):
    backbone = pico_backbone()
    exported(tmp_path, backbone, client_of(backbone))
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 2
    expected = {f"blocks.{i}.attn.qkv": 6 for i in range(2)}
    assert config["rank_pattern"] == config["alpha_pattern"] == expected


@pytest.mark.parametrize(
    ("kind", "way_out"),
    [(Kind.FULL, "--rank"), (Kind.IA3, "--rank"), (Kind.TANGENT, "as a folder instead")],
)
def test_other_kinds_are_refused_and_the_way_out_is_named(kind, way_out, tmp_path):
    backbone = pico_backbone()
    with pytest.raises(ContributionError, match=f"'hospital-b' is of kind {kind}.*{way_out}"):
        exported(tmp_path / "adapter", backbone, client_of(backbone, kind))
    assert not (tmp_path / "adapter").exists()


def test_a_client_of_another_backbone_is_refused(tmp_path):
    client = client_of(pico_backbone(seed=1))
    with pytest.raises(BackboneMismatch, match="pool was trained on the backbone pico@"):
        exported(tmp_path / "adapter", pico_backbone(seed=2), client)
    assert not (tmp_path / "adapter").exists()


def test_a_model_that_reads_weights_without_calling_the_layer_is_refused(peft, tmp_path):
    arguments = {key: value for key, value in PICO_ARGS.items() if key != "num_classes"}
    backbone = backbone_of("beit_base_patch16_224", **arguments)
    client = client_of(backbone)
    with pytest.raises(BackboneError, match=r"weight of 'blocks.0.attn.qkv' .*\(2 such layers\)"):
        exported(tmp_path / "adapter", backbone, client)
    assert not (tmp_path / "adapter").exists()
    assert not any(module._forward_hooks for module in backbone.model.modules())
    # The refusal is right: PEFT's own adapter on that layer changes no output.
    config = peft.LoraConfig(target_modules=["attn.qkv"], init_lora_weights=False)
    batch = backbone.preprocessing.normalise(images_for(backbone))
    plain = plain_model(backbone)
    with torch.no_grad():
        before = plain(batch)
        assert torch.equal(peft.get_peft_model(plain, config).eval()(batch), before)


def test_exporting_twice_writes_the_same_bytes(tmp_path):
    backbone = pico_backbone()
    for folder in ("a", "b"):
        exported(tmp_path / folder, backbone, client_of(backbone))
    files = {path.name: path.read_bytes() for path in Path(tmp_path / "a").iterdir()}
    assert files.keys() == {ADAPTER, ADAPTER_CONFIG, MODEL_CARD}
    assert files == {path.name: path.read_bytes() for path in Path(tmp_path / "b").iterdir()}
