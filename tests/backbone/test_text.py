"""Texts go the way of images: the same method, with another backbone and nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from app_runs import run
from builders import PATTERNS, random_like, rng
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.func import functional_call

from fedcompo.backbone.backbone import Backbone, load_backbone, target_weights
from fedcompo.backbone.stored import StoredBackbone, save_backbone
from fedcompo.backbone.text import ByteTransformer
from fedcompo.config.choices import Modality
from fedcompo.config.data import DataConfig
from fedcompo.config.run import BackboneConfig
from fedcompo.data.client_data import load_client_data
from fedcompo.errors import BackboneError, TooFewClients
from fedcompo.method.pool import Pool
from fedcompo.registry.registry import Registry

NAME = "byte_transformer_small"
LENGTH = 16
CLASSES = {"vowels": "aeiou", "digits": "12345", "marks": "!?.,;", "capitals": "QWXYZ"}
CLASSES |= {"brackets": "()[]{}", "signs": "+-*/="}


def pico(**options) -> ByteTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        arguments = {"img_size": LENGTH, "embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
        return ByteTransformer(**{**arguments, **options}).double().eval()


def some_bytes(count: int, *, filled_up: int = 0) -> Tensor:
    texts = torch.randint(1, 256, (count, 1, 1, LENGTH), generator=rng(0)).to(torch.uint8)
    texts[..., LENGTH - filled_up :] = 0
    return texts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Random weights of the small model, for short texts."""
    path = tmp_path_factory.mktemp("weights") / "bytes.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(NAME, img_size=LENGTH)
    safetensors.torch.save_file(model.state_dict(), path)
    return path


def load(checkpoint: Path, image_size: int = LENGTH, **options) -> Backbone:
    return load_backbone(
        BackboneConfig(NAME, checkpoint=str(checkpoint), image_size=image_size, **options)
    )


# -- the model ----------------------------------------------------------------------------------


def test_its_blocks_are_timms_and_the_default_patterns_choose_their_weights():
    model = pico()
    assert all(type(block) is Block for block in model.blocks)
    assert list(target_weights(model, PATTERNS)) == [
        f"blocks.{i}.{part}.weight"
        for i in range(2)
        for part in ("attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2")
    ]


def test_features_are_the_mean_of_the_tokens_that_hold_text():
    model, texts = pico(), some_bytes(3, filled_up=6)  # the last of four tokens holds none
    tokens = []
    model.norm.register_forward_hook(lambda _, inputs, output: tokens.append(output))
    features = model(texts)
    expected = sum(tokens[0][:, place] for place in range(3)) / 3
    torch.testing.assert_close(features, expected)


def test_a_token_sees_its_window_of_bytes_and_nothing_else():
    model, texts = pico(), some_bytes(1)
    windows = []
    model.windows.register_forward_hook(lambda _, inputs, output: windows.append(output[0].T))
    model(texts)
    for place in range(LENGTH):
        other = texts.clone()
        other[..., place] ^= 1
        model(other)
        seen = (windows[0] != windows[-1]).any(1).nonzero().flatten().tolist()
        assert seen == [token for token in range(4) if 4 * token - 2 <= place < 4 * token + 6]


def test_a_text_of_nothing_but_filling_has_finite_features():
    assert torch.isfinite(pico()(torch.zeros(2, 1, 1, LENGTH))).all()


def test_bytes_may_come_as_numbers_of_any_type():
    model, texts = pico(), some_bytes(4)
    expected = model(texts)
    for dtype in (torch.float32, torch.float64, torch.int64, torch.bfloat16):
        assert torch.equal(model(texts.to(dtype)), expected)


# -- as a backbone ------------------------------------------------------------------------------


def test_a_checkpoint_makes_a_backbone_that_reads_texts(checkpoint):
    backbone = load(checkpoint)
    assert backbone.preprocessing.modality == Modality.TEXTS
    assert backbone.preprocessing.shape == (1, 1, LENGTH)
    assert (backbone.num_features, len(backbone.theta_0)) == (128, 16)
    texts = some_bytes(3)
    expected = backbone.model(texts)  # the bytes themselves, not divided or shifted
    assert torch.equal(backbone.forward({})(texts), expected)


def test_the_forward_pass_under_other_weights_is_that_of_a_model_that_holds_them(checkpoint):
    backbone, texts = load(checkpoint), some_bytes(3)
    noise = random_like(backbone.theta_0, seed=1)
    theta = {name: weight + 0.1 * noise[name] for name, weight in backbone.theta_0.items()}
    oracle = timm.create_model(NAME, img_size=LENGTH).eval()
    oracle.load_state_dict({**backbone.model.state_dict(), **theta})
    torch.testing.assert_close(backbone.forward(theta)(texts), oracle(texts).detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 18}, "18 bytes and 1 channel.*must be a multiple of 4"),
        ({"channels": 3}, "3 channel.*`channels` 1"),
        ({"image_size": 32}, "do not fit"),
    ],
)
def test_another_input_than_the_model_can_read_is_refused(checkpoint, options, message):
    with pytest.raises(BackboneError, match=message):
        load(checkpoint, **options)


def test_without_a_checkpoint_it_is_refused_as_there_are_no_weights():
    with pytest.raises(BackboneError, match="set `checkpoint`"):
        load_backbone(BackboneConfig(NAME))


def test_a_name_that_is_nearly_its_is_refused_and_it_is_suggested():
    with pytest.raises(BackboneError, match=f"Did you mean {NAME}"):
        load_backbone(BackboneConfig("byte_transformer_smal"))


def test_what_was_stored_is_the_same_backbone_to_a_process_that_knows_only_where_it_lies(
    checkpoint, tmp_path
):
    backbone = load(checkpoint)
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, backbone)
    found = StoredBackbone(path).load()
    assert found.preprocessing == backbone.preprocessing
    assert torch.equal(found.forward({})(some_bytes(2)), backbone.forward({})(some_bytes(2)))
    code = (
        "import sys; from pathlib import Path; from fedcompo.backbone.stored import StoredBackbone;"
        "print(StoredBackbone(Path(sys.argv[1])).load().fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == backbone.fingerprint, done.stderr


# -- a federation -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(checkpoint, tmp_path_factory) -> dict:
    """Six classes of texts, told apart by their letters."""
    path = tmp_path_factory.mktemp("texts") / "corpus.jsonl"
    generator = rng(0)
    with path.open("w", encoding="utf-8") as file:
        for label, letters in CLASSES.items():
            for _ in range(16):
                drawn = torch.randint(len(letters), (12,), generator=generator)
                text = "".join(letters[place] for place in drawn)
                file.write(json.dumps({"text": text, "label": label}) + "\n")
    return {
        "data": f"text:{path}",
        "backbone": NAME,
        "checkpoint": str(checkpoint),
        "image_size": LENGTH,
        "num_classes": 0,
        "scale": 1.0,
    }


@pytest.fixture(scope="module", params=["lora", "full,ia3"])
def finished(request, settings, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("run") / "out"
    return output, run({}, output, **settings, kind=request.param, local_epochs=3)


def test_a_federation_on_texts_learns_to_tell_them_apart(finished):
    _, results = finished
    assert sorted(results["classes"]) == sorted(CLASSES)
    assert results["left_out"] == []
    assert results["class_il_accuracy"] > 0.7  # one in six by chance
    assert results["own_task_accuracy"] > 0.8


def test_the_registrys_model_is_theta_0_plus_the_mean_of_the_task_vectors(finished, settings):
    output, _ = finished
    registry = Registry(output / "registry")
    backbone, pool = registry.backbone.load(), registry.pool()
    theta = {
        name: weight.double() + sum(c.task_vector.dense(backbone.theta_0)[name] for c in pool) / 3
        for name, weight in backbone.theta_0.items()
    }
    texts = load_client_data(
        DataConfig(settings["data"], 3), backbone.preprocessing, partition=0, seed=0
    ).test.images
    model = registry.model()
    head = registry.joint_head()
    features = functional_call(backbone.model.double(), theta, (texts,))
    expected = features @ head.weight.double().T + head.bias
    actual = model(backbone.preprocessing.normalise(texts))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-4)


def test_plain_timm_loads_the_published_model(finished):
    output, _ = finished
    registry = Registry(output / "registry")
    published = timm.create_model(f"local-dir:{output}/registry/model", pretrained=True).eval()
    texts = some_bytes(3).float()
    assert torch.equal(published(texts), registry.model()(texts))


def test_a_removed_client_leaves_the_bits_of_a_pool_that_never_had_it(finished, tmp_path):
    output, _ = finished
    shutil.copytree(output / "registry", tmp_path / "registry", symlinks=True)
    registry = Registry(tmp_path / "registry")
    others = [c for c in registry.pool() if c.client != "client-1"]
    theta_0 = registry.backbone.load().theta_0
    never = Registry.create(tmp_path / "never", registry.backbone.load(), registry.settings)
    never.add(*others)
    registry.remove("client-1")
    expected, actual = never.theta_p(), registry.theta_p()
    assert all(torch.equal(actual[name], expected[name]) for name in theta_0)
    torch.testing.assert_close(dict(actual), Pool(tuple(others)).compose(theta_0))


def test_augmentation_is_refused_and_the_clients_say_why(settings, tmp_path):
    with pytest.raises(TooFewClients, match="moves the pixels of images, but these are texts"):
        run({}, tmp_path / "out", **settings, augmentation="shift")
