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

from fedcompo.backbone.backbone import Backbone, load_backbone, target_weights
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


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"epoch": 3, "state_dict": s}]
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
    with pytest.raises(BackboneError, match="never as code"):
        load(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_architecture_are_refused(checkpoint):
    with pytest.raises(BackboneError, match=r"(?s)do not fit 'vit_small_patch32_224'.*`backbone`"):
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
    with pytest.raises(BackboneError, match=f"'{name}' .or hold NaN there"):
        load(tmp_path / "nan.safetensors")


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
        ("weights.npz", b"", "do not fit"),
        pytest.param(
            "weights.npz",
            b"PK\x03\x04 junk",
            "do not fit",
        ),
        ("weights.safetensors", b"garbage", "cannot be read as .safetensors"),
        ("weights.pth", b"garbage", "cannot be read as .pth"),
        ("weights.bin", b"", "cannot be read as .bin"),
        ("weights.h5", b"garbage", "expected .safetensors, .pth or .npz"),
    ],
)
def test_garbage_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BackboneError, match=message):
        load(tmp_path / name)


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
