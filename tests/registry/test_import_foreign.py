"""Models and adapters under the names of Hugging Face's transformers, and (IA)³."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from builders import normal
from registry_builders import backbone
from torch import Tensor, nn

from fedcompo.backbone.adapter import read_adapter
from fedcompo.backbone.finetuned import read_difference, read_finetuned
from fedcompo.config.choices import Kind
from fedcompo.errors import BackboneError
from fedcompo.method.task_vector import TaskVector

VIT = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "head": "classifier",
    "block": "vit.encoder.layer.{}",
    "attn.qkv": (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
    ),
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
}
NEWER = VIT | {
    "block": "vit.layers.{}",
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
CLIP = {
    "cls_token": "vision_model.embeddings.class_embedding",
    "pos_embed": "vision_model.embeddings.position_embedding.weight",
    "patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "norm": "vision_model.post_layernorm",
    "head": "classifier",
    "block": "vision_model.encoder.layers.{}",
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
}
DINO = VIT | {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2", "norm1": "norm1", "norm2": "norm2"}
NAMINGS = {"dino": DINO, "vit": VIT, "newer": NEWER, "clip": CLIP}
"""What a layer of timm's is called elsewhere, written down from transformers 4.57 and 5.24."""


def tuned() -> dict[str, Tensor]:
    """The pico backbone after a fine-tuning of its target weights, with a classifier."""
    state = {name: tensor.clone() for name, tensor in backbone().model.state_dict().items()}
    for seed, name in enumerate(sorted(backbone().theta_0)):
        state[name] += normal(*state[name].shape, seed=seed, scale=0.05, dtype=torch.float32)
    state["head.weight"] = normal(3, 8, seed=90, dtype=torch.float32)
    state["head.bias"] = normal(3, seed=91, dtype=torch.float32)
    return state


def layers_of(layer: str, naming: dict[str, Any]) -> tuple[str, ...]:
    """What timm's layer is called elsewhere: one name, or three."""
    if not (match := re.fullmatch(r"blocks\.(\d+)\.(.+)", layer)):
        return (naming[layer],)
    own, home = naming[match[2]], naming["block"].format(match[1])
    return tuple(f"{home}.{name}" for name in ((own,) if isinstance(own, str) else own))


def renamed(state: dict[str, Tensor], naming: dict[str, Any]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in ("cls_token", "pos_embed"):
            made[naming[name]] = tensor if naming is not CLIP else tensor[0].squeeze(0)
            continue
        layer, _, leaf = name.rpartition(".")
        elsewhere = layers_of(layer, naming)
        parts = tensor.chunk(len(elsewhere))
        made |= {f"{n}.{leaf}": p.clone() for n, p in zip(elsewhere, parts, strict=True)}
    if naming is CLIP:
        made["vision_model.embeddings.class_embedding"] = state["cls_token"].flatten()
        made["vision_model.embeddings.position_ids"] = torch.arange(5)
    return made


def saved(folder: Path, state: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(state, folder / "model.safetensors")
    content = {"model_type": "vit", "num_attention_heads": 2, "hidden_act": "gelu", **config}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def same_change(vector: TaskVector, theta: dict[str, Tensor]) -> None:
    theta_0 = backbone().theta_0
    vector.check(theta_0, base=backbone().fingerprint, owner="ada")
    actual = {name: theta_0[name] + tau for name, tau in vector.dense(theta_0).items()}
    expected = {name: theta[name] for name in theta_0}
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_model_under_other_names_is_the_same_change(naming: str, tmp_path: Path) -> None:
    state = tuned()
    labels = {"id2label": {"0": "yak", "1": "dog", "2": "cat"}}
    written = {f"module.{name}": t for name, t in renamed(state, NAMINGS[naming]).items()}
    found = read_finetuned(saved(tmp_path, written, **labels), backbone())
    assert (found.rest, found.classes) == ((), ("yak", "dog", "cat"))
    same_change(found.task_vector, state)
    assert found.classifier is not None
    assert torch.equal(found.classifier[0], state["head.weight"])


def test_what_the_tables_do_not_know_is_named_with_what_computes_otherwise(tmp_path: Path) -> None:
    state = renamed(tuned(), VIT) | {"vit.pooler.dense.weight": torch.ones(8, 8)}
    said = {"hidden_act": "quick_gelu", "num_attention_heads": 4, "layer_norm_eps": 0.01}
    folder = saved(tmp_path, state, **said)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1], "image_std": [0.5]}')
    found = read_finetuned(folder, backbone())
    assert set(found.rest) >= {
        *(f"config.json: {key}" for key in said),
        *("preprocessor_config.json: image_mean", "vit.pooler.dense.weight"),
    }
    assert found.classes == ()


def test_what_a_configuration_leaves_out_is_its_librarys_default(tmp_path: Path) -> None:
    folder = saved(tmp_path, renamed(tuned(), CLIP))
    (folder / "config.json").write_text('{"model_type": "clip", "vision_config": {}}')
    assert read_finetuned(folder, backbone()).rest == ("config.json: hidden_act",)


def test_a_classifier_of_other_features_is_named(tmp_path: Path) -> None:
    state = renamed(tuned() | {"head.weight": torch.ones(3, 16)}, DINO)
    state["vit.embeddings.mask_token"] = torch.ones(1, 8)
    found = read_finetuned(saved(tmp_path, state), backbone())
    assert (found.classifier, found.rest) == (None, ("head.bias", "head.weight"))


def lacking(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor for name, tensor in state.items() if "0.attention.attention.key" not in name
    }


def twice(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {f"teacher.{name}": tensor + 0 for name, tensor in state.items()}


def narrower(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t[:, :4].clone() if "key.weight" in n else t for n, t in state.items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [(lacking, "lacks the key"), (twice, "several models"), (narrower, "cannot be fused")],
)
def test_a_wrong_model_under_other_names_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=said):
        read_finetuned(saved(tmp_path, change(renamed(tuned(), VIT))), backbone())


def nested(naming: dict[str, Any]) -> nn.Module:
    """The pico backbone's linear layers as a model of transformers has them; it need not run."""
    model = nn.Module()
    state = backbone().model.state_dict()
    for weight in backbone().theta_0:
        layer = weight.removesuffix(".weight")
        elsewhere = layers_of(layer, naming)
        parts = [state[f"{layer}.{leaf}"].chunk(len(elsewhere)) for leaf in ("weight", "bias")]
        for name, own, bias in zip(elsewhere, *parts, strict=True):
            home = model
            *path, last = name.split(".")
            for step in path:
                if not hasattr(home, step):
                    home.add_module(step, nn.Module())
                home = home.get_submodule(step)
            linear = nn.Linear(own.shape[1], own.shape[0])
            linear.load_state_dict({"weight": own, "bias": bias})
            home.add_module(last, linear)
    return model


def written(folder: Path, model: nn.Module, config: Any) -> dict[str, Tensor]:
    """Write an adapter by PEFT, its numbers drawn at random; return what PEFT merges it to."""
    peft = pytest.importorskip("peft", reason="`pip install .[dev]` brings PEFT")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config(peft))
        with torch.no_grad():
            for seed, parameter in enumerate(adapted.parameters()):
                if parameter.requires_grad:
                    parameter += normal(*parameter.shape, seed=seed, scale=0.3, dtype=torch.float32)
        adapted.save_pretrained(folder)
        return {n: t.detach() for n, t in adapted.merge_and_unload().state_dict().items()}


def fused(merged: dict[str, Tensor], naming: dict[str, Any]) -> dict[str, Tensor]:
    """PEFT's weights under timm's names."""
    return {
        name: torch.cat(
            [merged[f"{n}.weight"] for n in layers_of(name.removesuffix(".weight"), naming)]
        )
        for name in backbone().theta_0
    }


@pytest.mark.parametrize(
    ("naming", "targets", "more"),
    [
        ("vit", ["query", "value"], {}),
        ("vit", ["query", "key", "value", "dense"], {"use_rslora": True}),
        ("newer", ["q_proj", "v_proj", "fc1"], {"rank_pattern": {"q_proj": 2}}),
        ("clip", ["q_proj", "k_proj", "v_proj", "out_proj"], {"alpha_pattern": {"k_proj": 9}}),
        ("clip", ["q_proj", "k_proj", "v_proj"], {"r": 5}),  # together beyond the rank of a weight
    ],
)
def test_adapters_of_separate_layers_are_exact(
    naming: str, targets: list[str], more: dict[str, Any], tmp_path: Path
) -> None:
    own = NAMINGS[naming]
    given = {"r": 2, "lora_alpha": 5, "target_modules": targets, **more}
    merged = written(tmp_path, nested(own), lambda peft: peft.LoraConfig(**given))
    found = read_adapter(tmp_path, backbone())
    assert (found.rest, found.task_vector.kind) == ((), Kind.LORA)
    same_change(found.task_vector, fused(merged, own))


@pytest.mark.parametrize("naming", ["vit", "clip"])
@pytest.mark.parametrize("inputs", [[], ["fc2", "output.dense"]])
def test_scales_of_outputs_are_ours_and_scales_of_inputs_are_full(
    naming: str, inputs: list[str], tmp_path: Path
) -> None:
    own, outputs = NAMINGS[naming], ["key", "value", "k_proj", "v_proj"]
    merged = written(
        tmp_path,
        nested(own),
        lambda peft: peft.IA3Config(target_modules=outputs + inputs, feedforward_modules=inputs),
    )
    found = read_adapter(tmp_path, backbone())
    assert found.task_vector.kind == (Kind.FULL if inputs else Kind.IA3)
    same_change(found.task_vector, fused(merged, own))
    assert found.rest == ("blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias")
    for layer in ("blocks.0.attn.qkv",):  # PEFT's merge changes that bias indeed
        bias = torch.cat([merged[f"{n}.bias"] for n in layers_of(layer, own)])
        assert not torch.equal(bias, backbone().model.state_dict()[f"{layer}.bias"])


def test_scales_of_another_width_are_refused(tmp_path: Path) -> None:
    written(
        tmp_path,
        nested(VIT),
        lambda peft: peft.IA3Config(target_modules=["key"], feedforward_modules=[]),
    )
    file = tmp_path / "adapter_model.safetensors"
    state = {name: tensor[:3] for name, tensor in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(state, file)
    with pytest.raises(BackboneError, match=r"scales of .* have shape \(3, 1\)"):
        read_adapter(tmp_path, backbone())


@pytest.mark.parametrize("naming", [None, "vit", "clip"])
def test_a_difference_is_read_as_one(naming: str | None, tmp_path: Path) -> None:
    state, start = tuned(), backbone().model.state_dict()
    change = {name: state[name] - start[name] for name in start}
    written = (
        renamed(change, NAMINGS[naming])
        if naming
        else {f"module.{n}": t for n, t in change.items()}
    )
    if naming is None:  # what did not change may be left out
        written = {n: t for n, t in written.items() if "qkv.weight" in n}
        state = {n: t if "qkv.weight" in n else start.get(n, t) for n, t in state.items()}
    folder = tmp_path / "change"
    found = read_difference(saved(folder, written), backbone())
    assert not found.rest
    same_change(found.task_vector, state)


def test_a_model_is_no_difference_and_a_difference_no_model(tmp_path: Path) -> None:
    state, start = tuned(), backbone().model.state_dict()
    with pytest.raises(BackboneError, match="leave `--delta` out"):
        read_difference(saved(tmp_path / "model", state), backbone())
    change = {name: state[name] - start[name] for name in start}
    with pytest.raises(BackboneError, match="add `--delta`"):
        read_finetuned(saved(tmp_path / "change", change), backbone())
    short = {name: t for name, t in change.items() if "qkv" in name}
    with pytest.raises(BackboneError, match="add `--delta`"):
        read_finetuned(saved(tmp_path / "short", short), backbone())
    beside = change | {"pos_embed": change["pos_embed"] + 1, "head.weight": torch.ones(3, 8)}
    assert read_difference(saved(tmp_path / "more", beside), backbone()).rest == (
        *("head.weight", "pos_embed"),
    )
    both = {f"{who}.{n}": t + 0 for n, t in change.items() for who in ("teacher", "student")}
    with pytest.raises(BackboneError, match="several models"):
        read_difference(saved(tmp_path / "both", both), backbone())
    alien = {f"layers.{n}": t for n, t in change.items() if n.startswith("norm")}
    with pytest.raises(BackboneError, match="no target weight"):
        read_difference(saved(tmp_path / "alien", alien), backbone())
