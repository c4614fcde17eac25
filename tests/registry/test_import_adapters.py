"""LoRA adapters that PEFT itself wrote, as clients of a registry."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from builders import PICO_ARGS, normal
from cli_runs import run
from image_folders import write_images
from registry_builders import backbone, member, registry_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedcompo.backbone.adapter import ADAPTER, ADAPTER_CONFIG, read_adapter
from fedcompo.errors import BackboneError, BackboneMismatch, ContributionError
from fedcompo.registry.imports import Wanted, import_model

peft = pytest.importorskip("peft", reason="`pip install .[dev]` brings PEFT")


def written(folder: Path, **given: Any) -> tuple[Path, dict[str, Tensor]]:
    """An adapter that PEFT made of the pico backbone; and the weights that PEFT merges it to."""
    model = timm.create_model("vit_tiny_patch16_224", **{**PICO_ARGS, "num_classes": 2})
    model.load_state_dict(backbone().model.state_dict(), strict=False)
    chosen = {"r": 3, "lora_alpha": 5, "target_modules": r"blocks\..*(qkv|proj|fc1|fc2)"} | given
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(**chosen))
        with torch.no_grad():
            for seed, (name, parameter) in enumerate(adapted.named_parameters()):
                if parameter.requires_grad:
                    drawn = normal(*parameter.shape, seed=seed, scale=0.2, dtype=torch.float32)
                    parameter.copy_(parameter + 0.1 * drawn if "norm" in name else drawn)
        adapted.save_pretrained(folder)
        merged = adapted.merge_and_unload().state_dict()
    return folder, {name: tensor.detach() for name, tensor in merged.items()}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["qkv"]},
        {"fan_in_fan_out": True, "target_modules": ["fc1"]},
        {"rank_pattern": {"qkv": 2, r"blocks\.0\.mlp\.fc1": 1}, "alpha_pattern": {"fc1": 7}},
        {"rank_pattern": {"attn.proj": 4}, "alpha_pattern": {"^blocks.1.attn.qkv": 0.5}}
        | {"use_rslora": True},
        {"layers_to_transform": [1], "layers_pattern": "blocks", "target_modules": ["qkv", "fc2"]},
    ],
    ids=lambda given: "+".join(given) or "plain",
)
def test_the_weights_are_those_that_peft_merges(given: dict[str, Any], tmp_path: Path) -> None:
    folder, merged = written(tmp_path, **given)
    found = read_adapter(folder, backbone())
    assert not found.rest
    theta_0 = backbone().theta_0
    found.task_vector.check(theta_0, base=backbone().fingerprint, owner="ada")
    actual = {n: theta_0[n] + tau for n, tau in found.task_vector.dense(theta_0).items()}
    torch.testing.assert_close(actual, {n: merged[n] for n in theta_0}, rtol=0, atol=1e-6)
    assert any(not torch.equal(merged[n], theta_0[n]) for n in theta_0)


def test_an_adapter_becomes_a_client_with_its_own_head(tmp_path: Path) -> None:
    registry = registry_of(tmp_path / "registry", member("ben"))
    images = write_images(tmp_path / "images")
    folder, merged = written(tmp_path / "adapter", modules_to_save=["head"])
    made = import_model(folder, registry, client="ada", data=images, wanted=Wanted(("dog", "cat")))
    assert made.head.classes == ("cat", "dog")
    assert torch.equal(made.head.weight, merged["head.weight"].flip(0))
    registry.add(made)
    assert (
        import_model(folder, registry_of(tmp_path / "r"), client="a", data=images).settings[
            "imported-head"
        ]
        == "fitted"
    )


def test_what_export_writes_import_reads(tmp_path: Path) -> None:
    sent = member("ada")
    registry_of(tmp_path / "registry", sent)
    folder = tmp_path / "adapter"
    run("export", "--client", "ada", "-r", tmp_path / "registry", "-o", folder)
    found = read_adapter(folder, backbone())
    theta_0 = backbone().theta_0
    expected = sent.task_vector.dense(theta_0)
    torch.testing.assert_close(found.task_vector.dense(theta_0), expected, rtol=0, atol=0)
    assert found.classifier is not None
    assert torch.equal(found.classifier[0], sent.head.weight)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"lora_bias": True, "target_modules": ["qkv"]}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ],
)
def test_what_is_more_than_lora_is_refused_by_name(
    given: dict[str, Any], name: str, tmp_path: Path
) -> None:
    with pytest.raises(BackboneError, match=name):
        read_adapter(written(tmp_path, **given)[0], backbone())


@pytest.mark.parametrize(
    "given", [{"target_modules": ["qkv", "patch_embed.proj"]}, {"modules_to_save": ["norm"]}]
)
def test_what_lies_beside_the_target_weights_is_refused_by_name(
    given: dict[str, Any], tmp_path: Path
) -> None:
    registry, images = registry_of(tmp_path / "registry"), write_images(tmp_path / "images")
    folder, _ = written(tmp_path / "adapter", **given)
    with pytest.raises(ContributionError, match=r"patch_embed.proj.lora_A.weight|norm.bias"):
        import_model(folder, registry, client="ada", data=images)
    made = import_model(folder, registry, client="ada", data=images, wanted=Wanted(drop_rest=True))
    assert "(1)" in str(made.settings["imported-dropped"])


def test_a_larger_models_names_and_what_it_left_as_it_was_are_no_change(tmp_path: Path) -> None:
    folder, merged = written(tmp_path, target_modules=["qkv"])
    state = {n.replace("blocks", "vit.blocks"): t for n, t in load_file(folder / ADAPTER).items()}
    norm = {f"base_model.model.{n}": backbone().model.state_dict()[n] for n in ("norm.weight",)}
    save_file(state | norm, folder / ADAPTER)
    found = read_adapter(folder, backbone())
    assert not found.rest
    tau = found.task_vector.dense(backbone().theta_0)["blocks.0.attn.qkv.weight"]
    expected = merged["blocks.0.attn.qkv.weight"] - backbone().theta_0["blocks.0.attn.qkv.weight"]
    torch.testing.assert_close(tau, expected, rtol=0, atol=1e-6)
    apart = {
        f"base_model.model.norm.{part}": normal(8, seed=5).float() for part in ("weight", "bias")
    }
    save_file(state | apart, folder / ADAPTER)
    with pytest.raises(BackboneMismatch, match="trained on other weights"):
        read_adapter(folder, backbone())
    (folder / ADAPTER).unlink()
    with pytest.raises(BackboneError, match="the weights are missing"):
        read_adapter(folder, backbone())


def alien(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("attn.qkv", "attn.q_proj"): t for name, t in state.items()}


def other_rank(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    config["r"] = 2
    return state


def half_gone(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if "lora_A" in name}


def diverged(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t / 0 for name, t in state.items()}


def of_another_kind(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    config["peft_type"] = "VERA"
    return state


def of_two_models(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {n.replace("blocks", "teacher.blocks"): t + 0 for n, t in state.items()}


def from_the_future(config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Tensor]:
    config["use_more"] = True
    return state


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (alien, "for another model"),
        (other_rank, "have shapes"),
        (half_gone, "have shapes"),
        (diverged, "infinity or NaN"),
        (of_another_kind, "peft_type = 'VERA'"),
        (of_two_models, "which are both 'blocks.0.attn.qkv.weight'"),
        (from_the_future, "use_more = True"),
    ],
)
def test_a_wrong_adapter_is_refused_in_a_sentence(
    change: Callable[..., dict[str, Tensor]], said: str, tmp_path: Path
) -> None:
    folder, _ = written(tmp_path, target_modules=["qkv"])
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    save_file(change(config, load_file(folder / ADAPTER)), folder / ADAPTER)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=said):
        read_adapter(folder, backbone())
