"""Pixels of the evaluation transform are timm's own, to the bit, for all that timm configures."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import asdict, replace
from functools import cache
from itertools import cycle, islice

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from fedcompo.backbone import thin
from fedcompo.backbone.backbone import load_backbone
from fedcompo.backbone.preprocessing import Preprocessing
from fedcompo.backbone.stored import StoredBackbone, save_backbone
from fedcompo.config.choices import Modality
from fedcompo.config.run import BackboneConfig
from fedcompo.errors import BackboneError

SIZES = [(260, 150), (97, 211), (3, 2), (33, 64), (1, 1), (1, 19), (301, 7)]
"""Width and height: landscape, portrait, tiny, one pixel, thin."""
INTERPOLATIONS = ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
NAME = "vit_tiny_patch16_224"


@cache
def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@cache
def configurations() -> list[dict]:
    """All distinct ways in which pre-trained models of timm see a picture."""
    configs = (
        timm.get_pretrained_cfg(name).to_dict() for name in timm.list_models(pretrained=True)
    )
    resolved = (resolve_data_config(pretrained_cfg=config) for config in configs)
    return list({json.dumps(config, default=str): config for config in resolved}.values())


def assert_same(seen: Preprocessing, config: dict, given: Image.Image) -> None:
    """Compare normalised pixels with timm's, bit for bit; two greys are never normalised alike."""
    actual, expected = (
        seen.normalise(seen.resize(given)[None])[0],
        create_transform(**config)(given),
    )
    assert torch.equal(actual, expected), (config, given.size)


def test_pixels_are_timms_for_every_pretrained_model():
    configs = configurations()
    assert len(configs) > 100
    assert {c["crop_mode"] for c in configs} >= {"center", "squash", "border"}
    assert any(h != w for _, h, w in (c["input_size"] for c in configs))
    sizes = cycle(SIZES[:5])
    for config in configs:
        for size in islice(sizes, 2):
            assert_same(
                Preprocessing.of_timm(config, {}, Modality.PICTURES), config, picture(*size)
            )


def test_every_grey_is_normalised_to_timms_bits_in_a_batch():
    greys = torch.arange(256, dtype=torch.uint8).expand(7, 3, 3, 256)
    for config in configurations():
        normalise = create_transform(**config).transforms[-1]
        seen = Preprocessing.of_timm(config, {}, Modality.PICTURES)
        assert torch.equal(seen.normalise(greys)[6], normalise(greys[6].float().div(255)))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("side", [28, 57, (64, 48), (48, 64)])
def test_pixels_are_timms_for_every_mode_filter_and_proportion(side, mode):
    sides = side if isinstance(side, tuple) else (side, side)
    for interpolation in INTERPOLATIONS:
        for crop in (0.875, 0.95, 1.0, 1.15):
            seen = Preprocessing(
                side, 3, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3), interpolation, crop, crop_mode=mode
            )
            config = {
                "input_size": (3, *sides),
                "mean": seen.mean,
                "std": seen.std,
                "interpolation": interpolation,
                "crop_pct": crop,
                "crop_mode": mode,
            }
            for size in SIZES:
                assert_same(seen, config, picture(*size))


@pytest.mark.parametrize("side", [57, (64, 48)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_what_is_computed_of_a_thin_picture_alone_is_right_for_any(
    side, interpolation, monkeypatch
):
    monkeypatch.setattr(thin, "RATIO", 0)
    for crop in (0.875, 0.95, 1.0):
        seen = Preprocessing(side, 1, (0.4,), (0.1,), interpolation, crop)
        config = {"input_size": seen.shape, "mean": seen.mean, "std": seen.std}
        config |= {"interpolation": interpolation, "crop_pct": crop}
        for size in [*SIZES, *((width, 30) for width in range(1, 40))]:
            assert_same(seen, config, picture(*size).convert("L"))


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (3001, 3), (60_000, 1)])
def test_a_very_thin_picture_costs_little_memory(size, monkeypatch):
    """Enlarged whole, 1 x 3,000 pixels take 590 MB; neither Pillow nor numpy has 8 MB of it."""
    asked, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, size, *rest: asked.append(size) or resize(self, size, *rest),
    )
    seen = Preprocessing(224, 3, (0.5,) * 3, (0.5,) * 3, crop_fraction=0.9)
    seen.resize(Image.new("RGB", (300, 30)))
    assert asked.pop() == (2480, 248)  # a picture that is not thin is enlarged by Pillow
    tracemalloc.start()
    try:
        assert seen.resize(Image.new("RGB", size, "red"))[:, 0, 0].tolist() == [255, 0, 0]
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()
    assert not asked


# -- whose configuration holds --------------------------------------------------------------------

SQUASHED = {
    "input_size": [3, 64, 32],
    "mean": [0.1, 0.2, 0.3],
    "std": [0.2, 0.3, 0.4],
    "interpolation": "bilinear",
    "crop_pct": 0.8,
    "crop_mode": "squash",
}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """A model of a non-square input."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(NAME, img_size=(64, 32), num_classes=0).eval()


@pytest.fixture
def folder(model, tmp_path):
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path


@pytest.fixture
def square(tmp_path):
    """A checkpoint of 32 pixels."""
    state = timm.create_model(NAME, img_size=32, num_classes=0).state_dict()
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    return tmp_path


def load(folder, content: object, *, backbone: str = NAME, **options):
    (folder / "config.json").write_text(
        content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
    )
    path = str(folder / "weights.safetensors")
    return load_backbone(BackboneConfig(backbone=backbone, checkpoint=path, **options))


@pytest.mark.parametrize(
    "content",
    [
        {"architecture": NAME, "pretrained_cfg": SQUASHED},
        {"architecture": NAME, "model_args": {"img_size": [64, 32]}, "pretrained_cfg": SQUASHED},
        {"architecture": NAME, **SQUASHED},  # timm's earlier format
    ],
)
def test_a_configuration_beside_a_checkpoint_holds(content, folder, model):
    backbone, config = load(folder, content), resolve_data_config(pretrained_cfg=SQUASHED)
    assert backbone.preprocessing.shape == (3, 64, 32)
    given = picture(97, 211)
    assert_same(backbone.preprocessing, config, given)
    with torch.no_grad():
        expected = model(create_transform(**config)(given)[None])
    actual = backbone.forward({})(backbone.preprocessing.resize(given)[None])
    torch.testing.assert_close(actual, expected)
    save_backbone(folder / "stored", backbone)
    again = StoredBackbone(folder / "stored").load()
    assert again.preprocessing == backbone.preprocessing
    assert torch.equal(again.forward({})(backbone.preprocessing.resize(given)[None]), actual)


def test_settings_go_before_a_configuration_beside_a_checkpoint(square):
    content = {"architecture": NAME, "pretrained_cfg": SQUASHED | {"input_size": [3, 32, 32]}}
    seen = load(square, content, image_size=48, channels=1).preprocessing
    assert seen.shape == (1, 48, 48)
    assert (seen.crop_mode, seen.crop_fraction) == ("squash", 0.8)
    assert seen.mean == pytest.approx([0.2])


def test_a_configuration_of_another_library_is_named_and_left_aside(square, caplog):
    seen = load(square, {"architectures": ["ViTModel"], "image_size": 5}, image_size=32)
    assert seen.preprocessing.image_size == 32
    assert "config.json is not in timm's format" in caplog.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as timm's configuration"),
        ("1", "cannot be read as timm's configuration"),
        ({"architecture": "vit_base_patch16_224"}, r"describes 'vit_base_patch16_224'.*folder"),
        ({"interpolation": "cubic"}, r"'cubic'; expected one of .*bicubic"),
        ({"interpolation": 3}, "does not describe an input"),
        ({"std": [0.1, 0, 0.1]}, "std > 0"),
        ({"mean": "grey"}, "does not describe an input"),
        ({"crop_pct": 50}, "crop_pct is 50"),
        ({"input_size": [3, 64, 16]}, "not square.*Leave `image-size` out"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(content, said, square):
    if isinstance(content, dict) and "architecture" not in content:
        content = {"architecture": NAME, "pretrained_cfg": content}
    with pytest.raises(BackboneError, match=said):
        load(square, content, image_size=32)


# -- what was stored ------------------------------------------------------------------------------


def test_a_description_is_rebuilt_from_json_and_an_old_one_keeps_its_pixels():
    seen = Preprocessing((8, 6), 3, (0.1,) * 3, (0.2,) * 3, crop_mode="squash")
    assert Preprocessing.parse(json.loads(json.dumps(asdict(seen)))) == seen
    values = {**asdict(seen), "image_size": 224, "crop_mode": "center", "crop_fraction": 0.9}
    old = Preprocessing.parse({k: v for k, v in values.items() if k not in ("rule", "crop_mode")})
    assert old == replace(seen, image_size=224, crop_mode="center", crop_fraction=0.9, rule=1)
    given = picture(97, 211)
    enlarged = given.resize((249, 541), Image.Resampling.BICUBIC)  # 224 / 0.9 = 248.9
    expected = np.asarray(enlarged.crop((12, 158, 236, 382))).transpose(2, 0, 1)
    assert np.array_equal(old.resize(given).numpy(), expected)
    assert not torch.equal(replace(old, rule=2).resize(given), old.resize(given))


@pytest.mark.parametrize(
    "change", [{"rule": 3}, {"unknown": 1}, {"channels": 2}, {"image_size": 0}, {"image_size": "8"}]
)
def test_a_description_that_cannot_be_used_is_refused(change):
    values = asdict(Preprocessing(8, 1, (0.5,), (0.5,))) | change
    with pytest.raises(BackboneError):
        Preprocessing.parse(values)


def test_a_description_of_another_shape_does_not_fit_a_backbone():
    seen = Preprocessing(8, 1, (0.5,), (0.5,))
    assert replace(seen, rule=1).instead_of(seen).rule == 1
    with pytest.raises(BackboneError, match=r"\(1, 9, 9\).*\(1, 8, 8\)"):
        replace(seen, image_size=9).instead_of(seen)
