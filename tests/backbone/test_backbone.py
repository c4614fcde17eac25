"""Pre-trained weights: which get a delta, who they are, and every way to load them."""

from __future__ import annotations

import pickle
from importlib import resources
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from builders import PATTERNS, normal, pico_backbone, pico_model, pixels, random_like
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from fedcompo.backbone.backbone import (
    Backbone,
    _require_whole_patches,
    load_backbone,
    target_weights,
)
from fedcompo.backbone.prefixes import without_prefix
from fedcompo.config.run import BackboneConfig
from fedcompo.errors import BackboneError
from fedcompo.storage import tensorfile

TINY = "vit_tiny_patch16_224"


# -- target weights and the forward pass --------------------------------------------------------


def test_the_default_patterns_choose_four_weights_a_block():
    model = pico_model()
    chosen = target_weights(model, PATTERNS)
    assert list(chosen) == [
        f"blocks.{i}.{part}.weight"
        for i in range(2)
        for part in ("attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2")
    ]
    for name, weight in chosen.items():
        assert torch.equal(weight, model.state_dict()[name])
        assert not weight.requires_grad


def test_patterns_may_name_single_weights_and_may_overlap():
    chosen = target_weights(pico_model(), " blocks.1.mlp.fc?.weight , blocks.*.mlp.fc1.weight,")
    assert list(chosen) == [
        "blocks.0.mlp.fc1.weight",
        "blocks.1.mlp.fc1.weight",
        "blocks.1.mlp.fc2.weight",
    ]


def test_a_pattern_without_match_is_refused_and_the_names_are_listed():
    with pytest.raises(BackboneError, match=r"'layers\.\*'.*blocks\.0\.attn\.qkv\.weight"):
        target_weights(pico_model(), f"{PATTERNS},layers.*")


@pytest.mark.parametrize(
    ("pattern", "layer"),
    [
        ("blocks.0.norm1.weight", "LayerNorm"),
        ("patch_embed.proj.weight", "Conv2d"),
        ("blocks.0.mlp.fc1.bias", "Linear"),
        ("pos_embed", "VisionTransformer"),
        ("*.weight", "LayerNorm|Conv2d"),
    ],
)
def test_what_is_no_weight_of_a_linear_layer_is_refused(pattern, layer):
    with pytest.raises(BackboneError, match=layer):
        target_weights(pico_model(), pattern)


def test_the_forward_pass_under_other_weights_is_that_of_a_model_that_holds_them():
    backbone = pico_backbone()
    images = pixels(3, 1, 8)
    theta = {
        name: weight + 0.1 * change
        for (name, weight), change in zip(
            backbone.theta_0.items(), random_like(backbone.theta_0, seed=1).values(), strict=True
        )
    }
    before = backbone.forward({})(images)
    oracle = pico_model(dtype=torch.float32)
    oracle.load_state_dict({**oracle.state_dict(), **theta})
    expected = oracle((images.float() / 255 - 0.5) / 0.5)
    torch.testing.assert_close(backbone.forward(theta)(images), expected.detach())
    assert not torch.allclose(before, expected)
    assert torch.equal(backbone.forward({})(images), before)
    assert backbone.num_features == 8


# -- fingerprints ------------------------------------------------------------------------------


def flip_lowest_bit(tensor: Tensor) -> None:
    tensor.view(-1).view(torch.uint8)[0] ^= 1


def test_the_digest_changes_with_a_single_bit_of_any_weight():
    state = pico_model(dtype=torch.float32).state_dict()
    digests = {tensorfile.tensor_digest(state)}
    for tensor in state.values():
        flip_lowest_bit(tensor)
        digests.add(tensorfile.tensor_digest(state))
        flip_lowest_bit(tensor)
    assert len(digests) == len(state) + 1
    assert tensorfile.tensor_digest(state) in digests


# -- checkpoints -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm_model() -> nn.Module:
    """A small input keeps it fast; the head of ten classes has to be left out on loading."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(TINY, img_size=32, num_classes=10).eval()


@pytest.fixture(scope="module")
def state(timm_model) -> dict[str, Tensor]:
    return timm_model.state_dict()


@pytest.fixture(scope="module")
def checkpoint(state, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    safetensors.torch.save_file(state, path)
    return path


def load(checkpoint: Path | str, backbone: str = TINY, image_size: int = 32, **options) -> Backbone:
    return load_backbone(
        BackboneConfig(
            backbone=backbone, checkpoint=str(checkpoint), image_size=image_size, **options
        )
    )


@pytest.fixture(scope="module")
def loaded(checkpoint) -> Backbone:
    return load(checkpoint)


def test_features_of_a_checkpoint_are_those_of_timm(loaded, timm_model):
    images = pixels(2, 3, 32)
    with torch.no_grad():
        tokens = timm_model.forward_features((images.float() / 255 - 0.5) / 0.5)
        expected = timm_model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(loaded.forward({})(images), expected)
    assert loaded.num_features == 192
    assert len(loaded.theta_0) == 48


def test_a_loaded_backbone_is_frozen_in_evaluation_mode_and_knows_its_input(loaded):
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())
    assert loaded.preprocessing.image_size == 32
    assert loaded.preprocessing.channels == 3
    assert loaded.preprocessing.mean == (0.5, 0.5, 0.5)
    assert loaded.architecture == TINY
    rebuilt = timm.create_model(loaded.architecture, num_classes=0, **loaded.model_args)
    rebuilt.load_state_dict(loaded.model.state_dict())


def behind(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s},
        lambda s: {"epoch": 3, "state_dict": s},
        lambda s: behind("module.", s),
        lambda s: {"state_dict": behind("model.", s) | {"loss.weight": torch.ones(3)}},
        lambda s: {"model": behind("_orig_mod.module.encoder.", s)},
        lambda s: {"teacher": behind("backbone.", s), "student": behind("backbone.", zeros(s))},
        lambda s: behind("student.backbone.", zeros(s)) | behind("teacher.backbone.", s),
        lambda s: {
            "model_ema": zeros(s),
            "model": s,
            "optimizer": {"state": {0: {"m": zeros(s)["norm.bias"]}}},
        },
        lambda s: {"model_ema": s, "lr": 0.1},
        lambda s: {"state_dict": behind("module.visual.trunk.", s)},  # timm takes off a part
    ],
)
def test_a_pth_file_gives_the_same_backbone_as_safetensors(wrap, state, loaded, tmp_path):
    torch.save(wrap(state), tmp_path / "tiny.pth")
    assert load(tmp_path / "tiny.pth").fingerprint == loaded.fingerprint


def in_jax_layout(state: dict[str, Tensor], *, depth: int, heads: int) -> dict[str, np.ndarray]:
    """The same weights as Google's own checkpoints name and transpose them."""
    layers = {
        "Transformer/encoder_norm": "norm",
        **{
            f"Transformer/encoderblock_{i}/{theirs}": f"blocks.{i}.{ours}"
            for i in range(depth)
            for theirs, ours in {
                "LayerNorm_0": "norm1",
                "LayerNorm_2": "norm2",
                "MlpBlock_3/Dense_0": "mlp.fc1",
                "MlpBlock_3/Dense_1": "mlp.fc2",
            }.items()
        },
    }
    found = {
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
    }
    for theirs, ours in layers.items():
        weight = state[f"{ours}.weight"]
        part = "kernel" if weight.ndim == 2 else "scale"
        found[f"{theirs}/{part}"] = weight.T if weight.ndim == 2 else weight
        found[f"{theirs}/bias"] = state[f"{ours}.bias"]
    for i in range(depth):
        theirs = f"Transformer/encoderblock_{i}/MultiHeadDotProductAttention_1"
        attention = f"blocks.{i}.attn"
        weights, biases = (state[f"{attention}.qkv.{part}"].chunk(3) for part in ("weight", "bias"))
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            found[f"{theirs}/{part}/kernel"] = weight.T.unflatten(1, (heads, -1))
            found[f"{theirs}/{part}/bias"] = bias.unflatten(0, (heads, -1))
        out = state[f"{attention}.proj.weight"].T.unflatten(0, (heads, -1))
        found |= {
            f"{theirs}/out/kernel": out,
            f"{theirs}/out/bias": state[f"{attention}.proj.bias"],
        }
    return {name: tensor.numpy() for name, tensor in found.items()}


def test_a_prefix_is_taken_off_the_names_of_a_safetensors_file(state, loaded, tmp_path, caplog):
    others = {"decoder.weight": torch.ones(2), "decoder.bias": torch.ones(2)}
    safetensors.torch.save_file(behind("backbone.", state) | others, tmp_path / "p.safetensors")
    assert load(tmp_path / "p.safetensors").fingerprint == loaded.fingerprint
    assert "2 tensors of the checkpoint do not begin with 'backbone.'" in caplog.text


def test_names_that_timm_converts_are_found_in_a_nested_dictionary(state, monkeypatch):
    theirs = {f"layer{i}": tensor for i, tensor in enumerate(state.values())}

    def convert(given, model):
        return dict(zip(state, given.values(), strict=True)) if "layer0" in given else given

    model = timm.create_model(TINY, img_size=32, num_classes=0)
    monkeypatch.setattr(timm.models.vision_transformer, "checkpoint_filter_fn", convert)
    read, prefix = without_prefix(behind("model.", theirs), model)
    assert (prefix, read) == ("model.", theirs)


def test_a_prefix_without_all_of_the_models_names_is_named_with_what_is_missing(state, tmp_path):
    name = "blocks.3.norm1.weight"
    torch.save(behind("module.", {k: v for k, v in state.items() if k != name}), tmp_path / "p.pth")
    with pytest.raises(BackboneError, match=f"begin with 'module.'; without it, 1 of .*'{name}'"):
        load(tmp_path / "p.pth")


def test_two_models_of_equal_right_in_one_file_are_refused(state, tmp_path):
    torch.save({"first": state, "second": state}, tmp_path / "two.pth")
    with pytest.raises(
        BackboneError, match=r"several models that fit, behind first\. and second\."
    ):
        load(tmp_path / "two.pth")


def test_an_npz_file_in_the_layout_of_jax_gives_the_same_backbone(state, loaded, tmp_path):
    np.savez(tmp_path / "tiny.npz", **in_jax_layout(state, depth=12, heads=3))
    assert load(tmp_path / "tiny.npz").fingerprint == loaded.fingerprint


def test_the_fingerprint_is_the_same_on_reloading_and_tells_a_single_bit(
    checkpoint, loaded, state, tmp_path
):
    assert load(checkpoint).fingerprint == loaded.fingerprint
    assert loaded.fingerprint.startswith(f"{TINY}@")
    changed = {name: tensor.clone() for name, tensor in state.items()}
    flip_lowest_bit(changed["blocks.5.norm1.bias"])
    safetensors.torch.save_file(changed, tmp_path / "other.safetensors")
    assert load(tmp_path / "other.safetensors").fingerprint != loaded.fingerprint


def test_weights_that_are_read_are_not_drawn_before(checkpoint):
    before = torch.get_rng_state()
    load(checkpoint)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_image_size_resamples_the_position_embedding(checkpoint, state):
    larger = load(checkpoint, image_size=48)
    expected = resample_abs_pos_embed(state["pos_embed"], [3, 3], num_prefix_tokens=1)
    torch.testing.assert_close(larger.model.pos_embed.data, expected)
    assert larger.preprocessing.image_size == 48
    assert larger.forward({})(pixels(1, 3, 48)).shape == (1, 192)


def test_one_channel_adds_up_the_patch_embedding_of_three(checkpoint, state):
    grey = load(checkpoint, channels=1)
    expected = state["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(grey.model.patch_embed.proj.weight.data, expected)
    assert grey.preprocessing.channels == 1
    assert grey.preprocessing.mean == (0.5,)
    assert grey.forward({})(pixels(1, 1, 32)).shape == (1, 192)


def test_two_channels_are_refused(checkpoint):
    with pytest.raises(BackboneError, match=r"`channels` is 2; expected 1 .* or 3"):
        load(checkpoint, channels=2)


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "write", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj, 2))]
)
def test_a_pickle_with_code_is_refused_and_not_run(write, tmp_path):
    write({"model": Code(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(BackboneError, match=r"\(it holds more than tensors\)\. .* never as code"):
        load(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_architecture_are_refused(checkpoint):
    with pytest.raises(BackboneError, match=r"do not fit 'vit_small.*has shape \[.*`backbone`"):
        load(checkpoint, backbone="vit_small_patch32_224")


def test_a_missing_weight_is_refused_and_named(state, tmp_path):
    name = "blocks.3.norm1.weight"
    rest = {key: tensor for key, tensor in state.items() if key != name}
    safetensors.torch.save_file(rest, tmp_path / "part.safetensors")
    with pytest.raises(BackboneError, match=rf"lack 1 of the parameters .* '{name}'"):
        load(tmp_path / "part.safetensors")


def test_a_weight_that_is_not_a_number_is_refused(state, tmp_path):
    name = "blocks.3.norm1.weight"
    broken = {**state, name: state[name] * float("nan")}
    safetensors.torch.save_file(broken, tmp_path / "nan.safetensors")
    with pytest.raises(BackboneError, match=f"'{name}' .* at 192 of its 192 places"):
        load(tmp_path / "nan.safetensors")


def test_what_is_infinite_in_float32_is_refused_with_the_name_in_the_file(state, tmp_path):
    name = "blocks.3.attn.proj.weight"
    huge = state[name].double()
    huge[1, 2] = 1e300
    torch.save(behind("module.", {**state, name: huge}), tmp_path / "huge.pth")
    with pytest.raises(BackboneError, match=f"'module.{name}' .* at 1 of its 36864 places"):
        load(tmp_path / "huge.pth")


def test_an_infinite_buffer_is_refused(tmp_path):
    state = timm.create_model("eva02_tiny_patch14_224", img_size=28).state_dict()
    for name in ("rope.bands", "blocks.0.attn.mask"):  # one the model has, one it does not
        torch.save({**state, name: torch.tensor([1.0, float("inf")])}, tmp_path / "buffer.pth")
        with pytest.raises(BackboneError, match=f"'{name}' .* at 1 of its 2 places"):
            load(tmp_path / "buffer.pth", backbone="eva02_tiny_patch14_224", image_size=28)


def test_infinity_in_an_npz_file_is_refused(state, tmp_path):
    name = "blocks.3.norm1.bias"
    broken = {**state, name: state[name].clone().index_fill_(0, torch.tensor(5), -torch.inf)}
    np.savez(tmp_path / "tiny.npz", **in_jax_layout(broken, depth=12, heads=3))
    with pytest.raises(BackboneError, match=f"'{name}' .* at 1 of its 192 places"):
        load(tmp_path / "tiny.npz")


@pytest.mark.parametrize(("size", "said"), [(50, "48 or 64"), (8, "16")])
def test_an_image_size_that_is_no_multiple_of_the_patch_is_refused(checkpoint, size, said):
    with pytest.raises(BackboneError, match=rf"`image-size` is {size}, no .* Set it to {said}\."):
        load(checkpoint, image_size=size)


def test_the_image_size_of_the_pre_training_may_leave_a_border():
    name = "vit_so400m_patch14_siglip_384"  # 384 = 27 · 14 + 6
    model = timm.create_model("vit_tiny_patch16_224", patch_size=14, img_size=384, num_classes=0)
    cfg = timm.get_pretrained_cfg(name).to_dict()
    _require_whole_patches(model, cfg, 384)
    with pytest.raises(BackboneError, match="Set it to 378 or 392"):
        _require_whole_patches(model, cfg, 385)


def test_weights_of_a_deeper_model_are_refused_instead_of_dropped(state, tmp_path):
    last = {k: v for k, v in state.items() if k.startswith("blocks.11.")}
    deeper = {k.replace(".11.", ".12."): v.clone() for k, v in last.items()}
    safetensors.torch.save_file({**state, **deeper}, tmp_path / "deeper.safetensors")
    with pytest.raises(BackboneError, match=r"'blocks\.12\."):
        load(tmp_path / "deeper.safetensors")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights.npz", b"garbage", "do not fit"),
        ("weights.npz", b"", r"is empty \(0 bytes\)"),
        ("weights.npz", b"PK\x03\x04 junk", "zip archive .* cut off or damaged"),
        ("weights.npz", b"version https://git-lfs.github.com/spec/v1\noid", "`git lfs pull`"),
        ("weights.pth", b"version https://git-lfs.github.com/spec/v1\noid", "`git lfs pull`"),
        ("weights.bin", b"\n<!DOCTYPE html>\n<html>", "is a web page"),
        ("weights.safetensors", b"<html lang=en>", "is a web page"),
        ("weights.safetensors", b"garbage", "cannot be read as .safetensors"),
        ("weights.pth", b"garbage", "cannot be read as .pth"),
        ("weights.bin", b"", r"is empty \(0 bytes\). Download"),
        ("weights.h5", b"garbage", "expected .safetensors, .pth or .npz"),
    ],
)
def test_garbage_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BackboneError, match=message):
        load(tmp_path / name)


def write_as(kind: str, path: Path) -> None:
    tensors = {"a": normal(300, seed=1)}
    if kind == "safetensors":
        safetensors.torch.save_file(tensors, path)
    elif kind == "NumPy":
        with path.open("wb") as file:
            np.savez(file, a=tensors["a"].numpy())
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "PyTorch")


@pytest.mark.parametrize(
    ("kind", "suffix", "right"),
    [
        ("safetensors", ".pth", ".safetensors"),
        ("PyTorch", ".safetensors", ".pth"),
        ("old PyTorch", ".npz", ".pth"),
        ("NumPy", ".bin", ".npz"),
    ],
)
def test_a_file_with_the_suffix_of_another_kind_is_refused(kind, suffix, right, tmp_path):
    path = tmp_path / f"weights{suffix}"
    write_as(kind, path)
    kind = kind.removeprefix("old ")
    with pytest.raises(BackboneError, match=f"is a {kind} file by .*Rename it to end in {right}"):
        load(path)


@pytest.mark.parametrize(
    ("kind", "suffix"), [("safetensors", ".safetensors"), ("PyTorch", ".pth"), ("NumPy", ".npz")]
)
@pytest.mark.parametrize("kept", [20, -1])
def test_a_truncated_file_is_refused(kind, suffix, kept, tmp_path):
    path = tmp_path / f"weights{suffix}"
    write_as(kind, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BackboneError, match="cut off"):
        load(path)


@pytest.mark.parametrize(
    "content",
    [
        normal(3, seed=1),
        pytest.param(
            {"net": {"a": normal(3, seed=1)}, "epoch": 3},
        ),
    ],
    ids=["a tensor", "a dictionary of something else"],
)
def test_a_pth_file_that_holds_no_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(BackboneError):
        load(tmp_path / "other.pth")


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(BackboneError, match="There is no checkpoint"):
        load(tmp_path / "nothing.safetensors")


# -- names -------------------------------------------------------------------------------------


def test_an_unknown_name_is_refused_and_near_ones_are_suggested(checkpoint):
    with pytest.raises(BackboneError, match=rf"'vit_tny_patch16_224'\. Did you mean {TINY}"):
        load(checkpoint, backbone="vit_tny_patch16_224")


def test_an_unknown_tag_of_a_known_name_is_refused(checkpoint):
    with pytest.raises(BackboneError):
        load(checkpoint, backbone=f"{TINY}.nonsense")


@pytest.mark.parametrize("image_size", [0, 32])
def test_a_network_that_is_no_transformer_is_refused(checkpoint, image_size):
    with pytest.raises(BackboneError, match="vision transformer"):
        load(checkpoint, backbone="resnet10t", image_size=image_size)


def test_without_network_the_hub_is_refused_and_other_ways_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # read on import, hence the next line
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BackboneError, match=r"the hub .*`checkpoint`.*`backbone = embedded`"):
        load_backbone(BackboneConfig(backbone=TINY))
    with pytest.raises(BackboneError, match=r"`image-size` is 8, no multiple.*Set it to 16\."):
        load_backbone(BackboneConfig(backbone=TINY, image_size=8))


# -- the embedded backbone and a real one ------------------------------------------------------


def test_the_embedded_backbone_is_small_and_takes_grey_images_of_28_pixels():
    backbone = load_backbone(BackboneConfig())
    assert backbone.name == "embedded"
    assert sum(p.numel() for p in backbone.model.parameters()) <= 1_500_000
    assert (backbone.preprocessing.image_size, backbone.preprocessing.channels) == (28, 1)
    images = pixels(2, 1, 28)
    features = backbone.forward({})(images)
    assert features.shape == (2, backbone.num_features)
    assert torch.isfinite(features).all()
    assert not torch.allclose(features[0], features[1])
    assert backbone.fingerprint == load_backbone(BackboneConfig()).fingerprint


def test_the_embedded_files_are_small():
    sizes = [len(f.read_bytes()) for f in (resources.files("fedcompo") / "assets").iterdir()]
    assert 0 < sum(sizes) <= 3_000_000


def test_the_embedded_backbone_takes_no_checkpoint(checkpoint):
    with pytest.raises(BackboneError, match="brings its weights"):
        load(checkpoint, backbone="embedded")


def test_the_embedded_backbone_takes_other_image_sizes():
    backbone = load_backbone(BackboneConfig(image_size=56))
    features = backbone.forward({})(pixels(1, 1, 56))
    assert torch.isfinite(features).all()


def test_a_real_checkpoint_loads_and_keeps_its_fingerprint(shared_data):
    config = BackboneConfig(
        backbone="deit_tiny_patch16_224",
        checkpoint=str(shared_data / "deit_tiny_patch16_224.fp16.safetensors"),
        image_size=96,
    )
    backbone = load_backbone(config)
    assert backbone.num_features == 192
    assert backbone.preprocessing.mean == (0.485, 0.456, 0.406)
    assert load_backbone(config).fingerprint == backbone.fingerprint
    features = backbone.forward({})(pixels(1, 3, 96))
    assert torch.isfinite(features).all()
